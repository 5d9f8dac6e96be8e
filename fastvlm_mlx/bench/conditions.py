"""The conditions of a measurement: machine, software, load and power, without which a number means nothing."""

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.backend import blas
from fastvlm_mlx.machine import describe

Command = Callable[[Sequence[str]], str]
"""Runs a program and gives its standard output; an empty string where there is no such program."""


def run_command(arguments: Sequence[str]) -> str:
    """The standard output of a program; empty if it is missing or fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def conditions() -> dict[str, Any]:
    """What a measurement of this process depends on, as JSON values; no paths and no names of people or hosts."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastvlm_mlx": __version__,
        **asdict(describe()),
        "blas": asdict(blas()),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "power": power() if platform.system() == "Darwin" else None,
    }


def power(run: Command = run_command) -> dict[str, Any]:
    """MacOS's power source, low-power mode and thermal state, each None where the system does not tell.

    `source` is `AC Power` or `Battery Power`; `speed_limit` the percentage of its speed that the processor is held to
    by heat, 100 when it is not.
    """
    source = re.search(r"Now drawing from '([^']+)'", run(["pmset", "-g", "batt"]))
    saving = re.search(r"^\s*lowpowermode\s+(\d)", run(["pmset", "-g"]), re.MULTILINE)
    thermal = run(["pmset", "-g", "therm"])
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", thermal)
    cool = "No thermal warning level has been recorded" in thermal
    return {
        "source": source[1] if source else None,
        "low_power_mode": saving[1] == "1" if saving else None,
        "thermal_warning": None if not thermal else not cool and "hermal" in thermal,
        "speed_limit": int(limit[1]) if limit else None,
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
