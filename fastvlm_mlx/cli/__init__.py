"""The `fastvlm` command: the only part of the package that prints or exits.

Each command lives in a file of its own and imports the runtime inside its function, so that `--help` stays instant.
"""

from fastvlm_mlx.cli.app import app, main

__all__ = ["app", "main"]
