"""Runs the command line: `python -m fastvlm_mlx`."""

from fastvlm_mlx.cli import main

if __name__ == "__main__":
    main()
