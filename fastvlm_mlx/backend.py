"""Imports MLX after preloading a fast BLAS, and chooses the dtype to compute in.

Every module gets MLX from here (`from fastvlm_mlx.backend import mx, nn`), because on Linux the order matters: MLX's
CPU wheel is linked to the reference BLAS, about twenty times slower than OpenBLAS, and a library that is loaded
globally *before* MLX takes its place. So the BLAS is loaded at import, the one thing that importing this package does
to its process. macOS uses Accelerate and Metal and needs none of this.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from fastvlm_mlx.errors import ConfigError

BLAS_VARIABLE = "FASTVLM_BLAS"
_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True, kw_only=True)
class BLAS:
    """The BLAS behind MLX's CPU backend.

    Attributes:
        name: `Accelerate`, `OpenBLAS`, a library path given by the user, or `reference`.
        threads: Threads it uses, where it can be asked.
        hint: What to do for a faster one; empty when there is nothing to do.
    """

    name: str
    threads: int | None = None
    hint: str = ""


def _preload_blas() -> tuple[BLAS, ctypes.CDLL | None]:
    """Loads the BLAS that MLX will resolve its symbols to, unless MLX is loaded already.

    Raises:
        ConfigError: If the one that the user has chosen cannot be loaded.
    """
    if platform.system() != "Linux":
        return BLAS(name="Accelerate" if platform.system() == "Darwin" else "bundled"), None
    requested = os.environ.get(BLAS_VARIABLE)
    if requested == "none":
        return BLAS(name="reference", hint=f"unset {BLAS_VARIABLE} to let OpenBLAS be found"), None
    if "mlx.core" in sys.modules:
        return BLAS(name="reference", hint="import fastvlm_mlx before mlx, so that it can load OpenBLAS first"), None
    for name in (requested,) if requested else _OPENBLAS_NAMES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as err:
            if requested:
                raise ConfigError(
                    f"{BLAS_VARIABLE}={requested} cannot be loaded ({err}); set it to the path of a BLAS library, or "
                    "to none for MLX's own, or unset it to let OpenBLAS be found"
                ) from err
            continue
        threads = getattr(library, "openblas_get_num_threads", None)
        return BLAS(name=requested or "OpenBLAS", threads=threads() if threads else None), library
    return BLAS(name="reference", hint="apt install libopenblas0-pthread (or your system's OpenBLAS)"), None


_BLAS, _BLAS_LIBRARY = _preload_blas()

import mlx.core as mx  # noqa: E402  (the BLAS has to be there first)
import mlx.nn as nn  # noqa: E402

__all__ = ["BLAS", "blas", "blas_threads", "compute_dtype", "device", "mx", "nn"]


def blas() -> BLAS:
    """The BLAS behind MLX's CPU backend."""
    return _BLAS


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Lets each matrix product on the CPU use `count` threads within the context, where the BLAS can be told."""
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
