"""Programs of the system that show what it has: their output, or the reason why there is none."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from fastvlm_mlx.formatting import printable

SECONDS = 10.0
"""Seconds that such a program may take."""


class ProgramError(Exception):
    """A program that is missing, hangs or fails, in its own words."""


def output_of(command: Sequence[str], *, seconds: float = SECONDS) -> bytes:
    """What a program writes to stdout.

    Raises:
        ProgramError: If it cannot be started, does not end in time, or fails.
    """
    name = command[0].rpartition("/")[2]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as err:
        raise ProgramError(f"{name} does not answer within {seconds:g} s") from err
    except OSError as err:
        raise ProgramError(f"{name} cannot be started ({err.strerror or err})") from err
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ProgramError(f"{name}: {printable(lines[-1]) if lines else f'exit code {done.returncode}'}")
    return done.stdout
