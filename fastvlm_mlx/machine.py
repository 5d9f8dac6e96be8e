"""The machine: its chip and memory, and the CPU threads to use on it."""

import os
import platform
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties that decide how fast a model runs; every measurement records them.

    Attributes:
        device: MLX's default device, `gpu` or `cpu`.
        chip: The name of the GPU, or of the processor if MLX runs on it.
        cores: Logical processor cores.
        memory: Bytes of memory: the GPU's own if it has any, else the machine's.
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


def cpu_threads() -> int:
    """Number of CPU threads to use: the cores of this process, up to four.

    MLX's CPU streams and the resizing of images share their work among as many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def describe() -> Machine:
    """Describes this machine."""
    from importlib.metadata import version

    from fastvlm_mlx.backend import device, mx

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
    """The name that the chip's maker uses, or Metal's name if that cannot be found."""
    if platform.system() != "Darwin":
        return device_name
    import subprocess

    brand = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return brand.stdout.strip() or device_name


def tune_allocator() -> None:
    """Lets glibc reuse what MLX's CPU backend frees; for a program that does nothing else, such as the command line.

    By default glibc returns freed memory to the system and faults it in again page by page: 400,000 page faults for an
    image of 1024 px. All threads then share one heap that keeps large arrays, too, so the decoder's weights can take
    the place of the vision tower's. An allocator that the user has tuned is left alone.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.system() != "Linux" or tuned:
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)
