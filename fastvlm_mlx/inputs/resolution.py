"""Resolutions that the tower can run at; imports neither NumPy nor Pillow."""

from typing import Literal, TypeAlias

from fastvlm_mlx.arguments import as_whole
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.schema import shown

Resolution: TypeAlias = int | Literal["auto"] | None
"""A multiple of 64; `auto`, the smallest one that keeps the details; or None, the one that the weights are tuned at."""

MIN_AUTO_RESOLUTION = 256
MAX_RESOLUTION = 4096
"""The largest resolution in pixels: 4096 visual tokens, half of the context."""
_STEP = 64


def check_resolution(resolution: int) -> int:
    """Returns the resolution if the tower can run at it.

    Raises:
        ConfigError: If it cannot.
    """
    pixels = as_whole(resolution)
    if pixels is None:
        raise ConfigError(f"resolution must be a whole number of pixels or 'auto', not {shown(resolution)}")
    resolution = pixels
    if resolution % _STEP or not 0 < resolution <= MAX_RESOLUTION:
        below = min(max(resolution // _STEP, 1) * _STEP, MAX_RESOLUTION)
        raise ConfigError(
            f"resolution must be a multiple of {_STEP} from {_STEP} to {MAX_RESOLUTION}, "
            f"not {shown(resolution)}; try {below}"
        )
    return resolution


def auto_resolution(size: tuple[int, int], native: int) -> int:
    """The smallest resolution that does not reduce an image of `size` (W, H), from 256 up to `native`."""
    steps = -(-max(size) // _STEP)
    return min(max(steps * _STEP, MIN_AUTO_RESOLUTION), native)
