"""How fine the details of a picture are, and the smallest resolution that keeps them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.inputs.resolution import auto_resolutions
from fastvlm_mlx.inputs.turned import TurnedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_TILE = 10
"""Side of the places that are measured, in pixels of the resolution that is tried: about one small letter."""
_CELL = 4
"""Places begin and end at multiples of as many pixels of the model's own resolution."""
_FAINT = 60
"""Levels that are added to the contrast of a place, so that noise and faint texture do not count as details."""


def resolution_for_details(picture: Image | TurnedImage, native: int, detail: float) -> int:
    """The smallest resolution at which all details of a picture are at least `detail` pixels from one to the next.

    It lies between 256 and `native`, and is not larger than the picture; with infinite `detail` it is as large. The
    same picture gives the same result whichever way it is stored. What is not visible in shades of grey does not count.
    """
    turned = picture if isinstance(picture, TurnedImage) else TurnedImage(picture)
    *smaller, largest = auto_resolutions(turned.size, native)
    if not smaller or math.isinf(detail):
        return largest
    details = Details(turned, native)
    return next((resolution for resolution in smaller if details.spacing(resolution) >= detail), largest)


class Details:
    """The edges of a picture, counted in all places.

    In a place with stripes, the sum of the differences between neighbouring pixels, divided by the standard deviation
    of their levels, is the number of stripes. It does not depend on how sharp or how strong their edges are, nor does
    it grow where a large thing has a sharp edge. So letters count by their size, not by their contrast.

    Args:
        picture: What is measured, as large as it is or at the resolution `native`, if that is smaller.
        native: The model's own resolution, the largest that is tried.
    """

    def __init__(self, picture: TurnedImage, native: int) -> None:
        levels = _shades(picture, native)
        self._side = max(levels.shape)
        padded = np.pad(levels, [(0, -length % _CELL) for length in levels.shape], mode="edge")
        rows, columns = (length // _CELL for length in padded.shape)

        def in_cells(values: NDArray[np.uint16]) -> NDArray[np.uint32]:
            """Integral (rows + 1, columns + 1) over the cells; sums over a place are exact, as long as they fit."""
            narrow = values.reshape(rows, _CELL, -1).sum(1, dtype=np.uint32)
            integral = np.zeros((rows + 1, columns + 1), np.uint32)
            np.cumsum(narrow.reshape(rows, columns, _CELL).sum(2, dtype=np.uint32), 0, out=integral[1:, 1:])
            return np.cumsum(integral, 1, out=integral, dtype=np.uint32)

        changes = np.zeros(padded.shape, np.uint16)
        signed = padded.astype(np.int16)
        changes[:-1] += np.abs(signed[1:] - signed[:-1]).view(np.uint16)
        changes[:, :-1] += np.abs(signed[:, 1:] - signed[:, :-1]).view(np.uint16)
        wide = padded.astype(np.uint16)
        self._levels, self._squares, self._changes = in_cells(wide), in_cells(wide * wide), in_cells(changes)

    def spacing(self, resolution: int) -> float:
        """The smallest distance of two like details anywhere, in pixels of a picture of that resolution."""
        wanted = max(1, round(_TILE * self._side / resolution / _CELL))
        height, width = (min(wanted, length - 1) for length in self._levels.shape)
        pixels = np.float32(height * width * _CELL**2)

        def mean(integral: NDArray[np.uint32]) -> NDArray[np.float32]:
            upper, lower = integral[:-height], integral[height:]
            total = lower[:, width:] - lower[:, :-width] - upper[:, width:] + upper[:, :-width]
            return total.astype(np.float32) / pixels

        average = mean(self._levels)
        contrast = np.sqrt(np.maximum(mean(self._squares) - average * average, 0))
        density = float(np.max(mean(self._changes) / (contrast + np.float32(_FAINT))))
        # Stripes change the levels by four standard deviations from one to the next.
        return 4 * resolution / (self._side * density) if density else float("inf")


def _shades(picture: TurnedImage, native: int) -> NDArray[np.uint8]:
    """The levels of grey (H, W) of the upright picture, whose longer side is at most `native`."""
    from PIL import Image

    factor = max(1, max(picture.size) // native)
    grey = picture.reduced(factor).convert("L")
    if picture.turn is not None:
        grey = grey.transpose(picture.turn)
    longer = max(grey.size)
    if longer > native:
        width, height = (max(1, round(length * native / longer)) for length in grey.size)
        grey = grey.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(grey)
