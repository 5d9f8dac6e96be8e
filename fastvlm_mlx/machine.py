"""The machine that MLX runs on: what `fastvlm info` shows and every measurement is recorded with."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version

from fastvlm_mlx.backend import device, mx


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides how fast a model runs.

    Attributes:
        device: MLX's default device, `gpu` or `cpu`.
        chip: The name of the GPU, or of the processor where MLX runs on it.
        cores: Logical processor cores.
        memory: Bytes of the machine's memory; the GPU's own where it has some.
        system: Operating system, its version and the architecture.
        python: Version.
        mlx: Version.
    """

    device: str
    chip: str
    cores: int
    memory: int
    system: str
    python: str
    mlx: str


def describe() -> Machine:
    """This machine."""
    info = mx.device_info()
    return Machine(
        device=device(),
        chip=_chip(str(info["device_name"])),
        cores=os.cpu_count() or 1,
        memory=int(info.get("memory_size") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        system=f"{_system()} {platform.machine()}",
        python=platform.python_version(),
        mlx=version("mlx"),
    )


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _chip(device_name: str) -> str:
    """The chip's name as its maker writes it; Metal's own name for it will do where there is no other."""
    if platform.system() != "Darwin":
        return device_name
    brand = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return brand.stdout.strip() or device_name
