"""Checks of the arrays that a model is given; each check returns the array in the form that is used.

Shapes: B batch, R resolution in pixels, T token ids.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.errors import ConfigError, FastVLMError, PromptError
from fastvlm_mlx.formatting import printable


def token_rows(input_ids: Any, attention_mask: Any, vocabulary: int) -> list[npt.NDArray[np.int32]]:
    """The token ids of each row without its padding.

    Args:
        input_ids: (B, T), or (T,) for one row.
        attention_mask: (B, T), False or 0 where `input_ids` is padding; None if nothing is.
        vocabulary: The number of ids.

    Raises:
        PromptError: If these are no token ids, a row has none, or one is neither in the vocabulary nor `IMAGE_TOKEN`.
    """
    ids = _array(input_ids, "input_ids", PromptError)
    if ids.size and ids.dtype.kind not in "iu":
        raise PromptError(f"input_ids must be whole numbers below 2**63, not {ids.dtype}")
    if ids.ndim not in (1, 2) or len(ids) == 0:
        raise PromptError(f"input_ids must be (B, T) or, for one row, (T,), not {ids.shape}")
    rows = list(np.atleast_2d(ids))
    if attention_mask is not None:
        mask = _array(attention_mask, "attention_mask", PromptError)
        if mask.shape != ids.shape or mask.dtype.kind not in "biu":
            raise PromptError(
                f"attention_mask must have a truth value for each of the {ids.shape} token ids, not {mask.dtype} of "
                f"shape {mask.shape}"
            )
        rows = [row[kept] for row, kept in zip(rows, np.atleast_2d(mask).astype(bool), strict=True)]
    if any(len(row) == 0 for row in rows):
        raise PromptError("input_ids has a row without tokens")
    for row in rows:
        wrong = row[((row < 0) | (row >= vocabulary)) & (row != IMAGE_TOKEN)]
        if len(wrong):
            raise PromptError(
                f"token id {wrong[0]} is outside the vocabulary of {vocabulary}; only {IMAGE_TOKEN}, an image's "
                "place, may be"
            )
    return [row.astype(np.int32) for row in rows]


def check_pixels(pixel_values: Any) -> mx.array:
    """Pixel values (B, R, R, 3), uint8 or floats in [0, 1]; the two sides may differ.

    Raises:
        ConfigError: If these are no such values, or a side is not a multiple of 64.
    """
    if not isinstance(pixel_values, mx.array):
        array = _array(pixel_values, "pixel_values", ConfigError)
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise ConfigError(f"pixel_values must be uint8, or float in [0, 1], not {array.dtype}")
        pixel_values = array if array.dtype == np.uint8 else _float32(array)
    pixels: mx.array = mx.array(pixel_values)
    shape = pixels.shape
    if len(shape) != 4 or shape[-1] != 3 or shape[1] % 64 or shape[2] % 64 or 0 in shape:
        raise ConfigError(f"pixel_values must be (B, R, R, 3) with R a multiple of 64, not {shape}")
    if pixels.dtype == mx.uint8:
        return pixels
    if not mx.issubdtype(pixels.dtype, mx.floating):
        raise ConfigError(f"pixel_values must be uint8, or float in [0, 1], not {str(pixels.dtype)[9:]}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ConfigError(f"float pixel_values must be in [0, 1], not [{low:g}, {high:g}]; divide or clip them")
    return pixels


def float_array(values: Any, name: str, axes: tuple[str | int, ...]) -> mx.array:
    """Floats with certain axes: a number is the length of an axis, a letter stands for any length but 0.

    Raises:
        ConfigError: If `values` are none; the message calls them `name`.
    """
    if not isinstance(values, mx.array):
        array = _array(values, name, ConfigError)
        if array.dtype.kind != "f":
            raise ConfigError(f"{name} must be floats, not {array.dtype}")
        values = _float32(array)
    floats: mx.array = mx.array(values)
    shape = floats.shape
    lengths = [length if isinstance(axis, str) else axis for axis, length in zip(axes, shape, strict=False)]
    if len(shape) != len(axes) or 0 in shape or lengths != list(shape):
        raise ConfigError(f"{name} must be ({', '.join(map(str, axes))}), not {shape}")
    if not mx.issubdtype(floats.dtype, mx.floating):
        raise ConfigError(f"{name} must be floats, not {floats.dtype}")
    return floats


def _float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """An array in float32; values beyond its range become infinite without a warning, and are refused as such."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def check_cache(cache: Any, layers: int) -> None:
    """Checks that a cache has an entry for each layer of the decoder.

    Raises:
        ConfigError: If it has not.
    """
    if not isinstance(cache, (list, tuple)) or not all(hasattr(layer, "update_and_fetch") for layer in cache):
        raise ConfigError(f"cache must be a list of KVCache, not {type(cache).__name__}")
    if len(cache) != layers:
        raise ConfigError(f"cache must have an entry for each of the {layers} layers, not {len(cache)}")


def _array(values: Any, name: str, error: type[FastVLMError]) -> npt.NDArray[Any]:
    """What NumPy makes of a value."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as err:  # rows of different lengths, for one
        raise error(f"{name} cannot be read as an array: {printable(err)}") from err
