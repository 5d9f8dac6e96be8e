"""The conditions of a measurement: machine, software, load and power."""

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.backend import BLAS, blas
from fastvlm_mlx.bench.records import record
from fastvlm_mlx.machine import Machine, describe

Command = Callable[[Sequence[str]], str]
"""Runs a program and returns its standard output, which is empty if there is no such program."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Power source and thermal state of a Mac; each is None where macOS does not say.

    Attributes:
        source: `AC Power` or `Battery Power`.
        low_power_mode: Whether it is on.
        thermal_warning: Whether macOS has recorded one.
        speed_limit: Percentage of full speed that heat leaves to the processor; 100 if it does not limit it.
    """

    source: str | None
    low_power_mode: bool | None
    thermal_warning: bool | None
    speed_limit: int | None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the figures of a measurement depend on; holds no paths and no names of people or hosts.

    Attributes:
        time: When the measurement began, in UTC, as ISO 8601.
        fastvlm_mlx: Version of this package.
        machine: Hardware, operating system and versions.
        blas: The BLAS that serves MLX's CPU backend.
        load_average: Of the last 1, 5 and 15 minutes.
        power: None where the system is not macOS.
    """

    time: str
    fastvlm_mlx: str
    machine: Machine
    blas: BLAS
    load_average: tuple[float, ...]
    power: Power | None

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object, in which the machine's fields stand beside the others."""
        return {
            "time": self.time,
            "fastvlm_mlx": self.fastvlm_mlx,
            **asdict(self.machine),
            "blas": asdict(self.blas),
            "load_average": list(self.load_average),
            "power": self.power and asdict(self.power),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Conditions":
        """Reads what `to_dict` returns.

        Raises:
            ConfigError: If a field is missing.
        """
        return record(
            cls,
            values,
            machine=record(Machine, values),
            blas=record(BLAS, values["blas"]),
            load_average=tuple(values["load_average"]),
            power=values["power"] and record(Power, values["power"]),
        )


def run_command(arguments: Sequence[str]) -> str:
    """Returns the standard output of a program; an empty string if it is missing or fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def conditions() -> Conditions:
    """Returns the conditions that hold now."""
    return Conditions(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        fastvlm_mlx=__version__,
        machine=describe(),
        blas=blas(),
        load_average=tuple(round(load, 2) for load in os.getloadavg()),
        power=power() if platform.system() == "Darwin" else None,
    )


def power(run: Command = run_command) -> Power:
    """Asks macOS for its power source, low-power mode and thermal state."""
    source = re.search(r"Now drawing from '([^']+)'", run(["pmset", "-g", "batt"]))
    saving = re.search(r"^\s*lowpowermode\s+(\d)", run(["pmset", "-g"]), re.MULTILINE)
    thermal = run(["pmset", "-g", "therm"])
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", thermal)
    cool = "No thermal warning level has been recorded" in thermal
    return Power(
        source=source[1] if source else None,
        low_power_mode=saving[1] == "1" if saving else None,
        thermal_warning=None if not thermal else not cool and "hermal" in thermal,
        speed_limit=int(limit[1]) if limit else None,
    )


def peak_resident_bytes() -> int:
    """Returns the largest amount of RAM that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
