"""MLX itself, with the machine's fast BLAS in front of it, and the dtype to compute in.

Every module gets MLX from here (`from fastvlm_mlx.backend import mx, nn`), because on Linux the order matters: MLX's
CPU wheel is linked to the reference BLAS, about twenty times slower than OpenBLAS, and a library that is loaded
globally *before* MLX takes its place. macOS uses Accelerate and Metal and needs none of this.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

BLAS_VARIABLE = "FASTVLM_BLAS"
_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True, kw_only=True)
class BLAS:
    """Which BLAS serves MLX's CPU backend.

    Attributes:
        name: `Accelerate`, `OpenBLAS`, a library path given by the user, or `reference`.
        threads: Threads it uses, where it can be asked.
        hint: What to do for a faster one; empty when there is nothing to do.
    """

    name: str
    threads: int | None = None
    hint: str = ""


def _preload_blas() -> tuple[BLAS, ctypes.CDLL | None]:
    """The BLAS that MLX will resolve its symbols to; loads it when MLX is not loaded yet."""
    if platform.system() != "Linux":
        return BLAS(name="Accelerate" if platform.system() == "Darwin" else "bundled"), None
    wanted = os.environ.get(BLAS_VARIABLE)
    if wanted == "none":
        return BLAS(name="reference", hint=f"unset {BLAS_VARIABLE} to let OpenBLAS be found"), None
    if "mlx.core" in sys.modules:
        return BLAS(name="reference", hint="import fastvlm_mlx before mlx, so that it can load OpenBLAS first"), None
    for name in (wanted,) if wanted else _OPENBLAS_NAMES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        threads = getattr(library, "openblas_get_num_threads", None)
        return BLAS(name=wanted or "OpenBLAS", threads=threads() if threads else None), library
    hint = (
        f"{BLAS_VARIABLE}={wanted} cannot be loaded"
        if wanted
        else "apt install libopenblas0-pthread (or your system's OpenBLAS)"
    )
    return BLAS(name="reference", hint=hint), None


def _keep_freed_memory() -> None:
    """Lets glibc reuse what MLX's CPU backend frees, instead of giving it back and faulting it in again page by page.

    The backend allocates every intermediate array anew; 400,000 page faults per image of 1024 px become none. All
    threads share one heap, and large arrays lie in it too, so that what one has freed serves any other: the decoder's
    weights take the place of the vision tower's. An allocator that the user has tuned is left alone.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.system() != "Linux" or tuned:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)


_keep_freed_memory()
_BLAS, _BLAS_LIBRARY = _preload_blas()

import mlx.core as mx  # noqa: E402  (the BLAS has to be there first)
import mlx.nn as nn  # noqa: E402

__all__ = ["BLAS", "blas", "blas_threads", "compute_dtype", "device", "mx", "nn"]


def blas() -> BLAS:
    """The BLAS behind MLX's CPU backend."""
    return _BLAS


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Lets each matrix product on the CPU use `count` threads meanwhile, where the BLAS can be told."""
    if _BLAS_LIBRARY is None or _BLAS.threads is None:
        yield
        return
    _BLAS_LIBRARY.openblas_set_num_threads(count)
    try:
        yield
    finally:
        _BLAS_LIBRARY.openblas_set_num_threads(_BLAS.threads)


def device() -> str:
    """The kind of MLX's default device: `gpu` (Metal, CUDA) or `cpu`."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"


def compute_dtype(stored: str) -> mx.Dtype:
    """The dtype to compute in for weights stored as `stored` (`float16`, `bfloat16`, `float32`).

    A GPU computes in what is stored. The CPU backend has no fast half-precision arithmetic, so there it is float32.
    """
    return mx.float32 if device() == "cpu" else getattr(mx, stored)
