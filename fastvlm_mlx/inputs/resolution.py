"""Resolutions that the tower can run at; imports neither NumPy nor Pillow."""

import math
from typing import TypeAlias

from fastvlm_mlx.arguments import as_whole
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.schema import shown

Resolution: TypeAlias = int | str | None
"""A multiple of 64; `auto`, the smallest one that does not reduce an image; or None, the one that weights are tuned at.

`auto:8` reduces an image further, as long as its finest details have 8 pixels each: see `inputs/detail.py`.
"""

AUTO = "auto"

MIN_AUTO_RESOLUTION = 256
MAX_DETAIL = 64
MAX_RESOLUTION = 4096
"""The largest resolution in pixels: 4096 visual tokens, half of the context."""
_STEP = 64


def check_resolution(resolution: object) -> int:
    """Returns the resolution if the tower can run at it.

    Raises:
        ConfigError: If it cannot.
    """
    pixels = as_whole(resolution)
    if pixels is None:
        raise ConfigError(f"resolution must be a whole number of pixels or 'auto', not {shown(resolution)}")
    if pixels % _STEP or not 0 < pixels <= MAX_RESOLUTION:
        below = min(max(pixels // _STEP, 1) * _STEP, MAX_RESOLUTION)
        raise ConfigError(
            f"resolution must be a multiple of {_STEP} from {_STEP} to {MAX_RESOLUTION}, "
            f"not {shown(pixels)}; try {below}"
        )
    return pixels


def auto_detail(resolution: object) -> float | None:
    """The pixels that `auto:PIXELS` gives to a detail; infinity for `auto`; None if the resolution is no such text.

    Raises:
        ConfigError: If it begins like one, but its number is not one from 1 to 64.
    """
    if not isinstance(resolution, str) or not (resolution == AUTO or resolution.startswith(f"{AUTO}:")):
        return None
    if resolution == AUTO:
        return math.inf
    text = resolution[len(AUTO) + 1 :]
    try:
        detail = float(text)
    except ValueError:
        detail = math.nan
    if not 1 <= detail <= MAX_DETAIL:
        raise ConfigError(f"a detail takes 1 to {MAX_DETAIL} pixels, as in auto:12, not {shown(text)}")
    return detail


def as_resolution(value: object) -> int | str:
    """Returns a value if it is a resolution that the tower can run at, `auto` or `auto:PIXELS`.

    Raises:
        ConfigError: If it is none.
    """
    return str(value) if auto_detail(value) is not None else check_resolution(value)


def auto_resolutions(size: tuple[int, int], native: int) -> range:
    """What `auto` may choose for an image of `size` (W, H): from 256 to what does not reduce it, at most `native`."""
    steps = -(-max(size) // _STEP)
    largest = min(max(steps * _STEP, MIN_AUTO_RESOLUTION), native)
    return range(min(MIN_AUTO_RESOLUTION, largest), largest + 1, _STEP)
