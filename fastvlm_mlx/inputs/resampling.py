"""Pillow's bicubic filter along the rows of a tall picture, padded with black, without filtering the black."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BITS = 22
"""Pillow rounds the weights of 8-bit samples to multiples of 2 to the power of −22."""
_ONE = 1 << _BITS
_RADIUS = 2
"""Bicubic weights are zero from here on, in units of the larger of input and output pixels."""
_TABLE_VALUES = 1 << 22


class RowFilter:
    """Filters rows of `width` pixels as if `left` black pixels, and more on the right, made them `side` pixels long.

    A row of `side` pixels gives `resolution` outputs. Only those are computed that the picture's pixels reach, from the
    pixels that reach them: the work follows the picture's area, where Pillow's follows the square's.

    Attributes:
        first: The first of these outputs.
        count: How many there are.
    """

    def __init__(self, *, left: int, width: int, side: int, resolution: int) -> None:
        scale = side / resolution
        reach = _RADIUS * max(scale, 1.0) + 1  # a pixel more, so that rounding cannot matter
        self.first = max(math.floor((left - reach) / scale), 0)
        self.count = min(math.ceil((left + width + reach) / scale), resolution) - self.first
        # Columns whose distance is a multiple of `period` never reach the same output.
        period = min(math.ceil(2 * reach) + 1, width)
        weights = np.concatenate(list(self._weights(left, width, side, resolution, period)))
        self._windows = []
        for output in range(self.count):
            centre = (self.first + output + 0.5) * scale - left
            columns = np.arange(max(math.floor(centre - reach), 0), min(math.ceil(centre + reach), width))
            if len(columns):
                window = slice(columns[0], columns[-1] + 1)
                self._windows.append((output, window, weights[columns % period, output]))

    def _weights(self, left: int, width: int, side: int, resolution: int, period: int) -> Iterator[NDArray[np.int32]]:
        """Weights of the columns 0, 1, …, period − 1 and all that follow in steps of `period`, for every output.

        They come from Pillow itself: it filters 32-bit rows that are `_ONE` in these columns and 0 elsewhere. So they
        are equal to the ones that it uses for 8-bit samples, whatever way the processor rounds.
        """
        from PIL import Image

        rows = max(_TABLE_VALUES // side, 1)
        for start in range(0, period, rows):
            impulses = np.zeros((min(rows, period - start), side), dtype=np.int32)
            for row, impulse in enumerate(impulses, start):
                impulse[left + row : left + width : period] = _ONE
            image = Image.fromarray(impulses)
            response = np.asarray(image.resize((resolution, len(impulses)), Image.Resampling.BICUBIC))
            yield response[:, self.first : self.first + self.count]

    def __call__(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) -> (H, count, 3)."""
        columns = np.ascontiguousarray(rows.transpose(1, 2, 0), dtype=np.int32).reshape(rows.shape[1], -1)
        sums = np.zeros((self.count, columns.shape[1]), dtype=np.int32)
        for output, window, weights in self._windows:
            np.einsum("w,wh->h", weights, columns[window], out=sums[output])
        levels = ((sums + _ONE // 2) >> _BITS).clip(0, 255).astype(np.uint8)
        return levels.reshape(self.count, 3, -1).transpose(2, 0, 1)
