"""The machine and the process: chip and memory, the CPU threads to use, the cache folder, the standard streams."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import CheckpointError, ConfigError

CACHE_VARIABLE = "FASTVLM_CACHE"
THREADS_VARIABLE = "FASTVLM_THREADS"


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


def cache_folder() -> Path:
    """The folder for converted checkpoints: `$FASTVLM_CACHE`, else `fastvlm-mlx` in the user's cache folder.

    Raises:
        CheckpointError: If the user has no home folder.
    """
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # its specification says to ignore it then
        shared = "~/.cache"
    chosen = Path(os.environ.get(CACHE_VARIABLE) or Path(shared, "fastvlm-mlx"))
    try:
        if chosen.parts[0] == "~" and not os.path.isabs(os.environ.get("HOME", "/")):
            raise RuntimeError("HOME is empty or relative")
        return chosen.expanduser()
    except RuntimeError as err:
        raise CheckpointError(f"there is no home folder; set {CACHE_VARIABLE} to a folder for models") from err


def cpu_threads() -> int:
    """Number of CPU threads to use: `$FASTVLM_THREADS`, else the cores of this process, up to four.

    MLX's CPU streams and the resizing of images share their work among as many.

    Raises:
        ConfigError: If the variable is no number from 1 to 64.
    """
    if chosen := os.environ.get(THREADS_VARIABLE):
        if not chosen.isdecimal() or not 1 <= int(chosen) <= 64:
            raise ConfigError(f"{THREADS_VARIABLE}={chosen}: expected a number of threads from 1 to 64")
        return int(chosen)
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


@contextmanager
def descriptor_zero_taken() -> Iterator[None]:
    """Keeps files that are opened in a `with` block from getting descriptor 0, which MLX takes for a failure."""
    taken = None
    try:
        os.fstat(0)
    except OSError:  # stdin is closed
        taken = os.open(os.devnull, os.O_RDONLY)
    try:
        yield
    finally:
        if taken is not None:
            os.close(taken)


def open_missing_streams() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed; before any file is opened.

    The first file would take the free descriptor: messages would be written into it, and MLX takes descriptor 0 for a
    failure.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", errors="replace"))
