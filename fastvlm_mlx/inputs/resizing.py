"""A picture on a black square -> R×R pixels: Pillow's bicubic filter to the bit, without making the square."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.inputs.resampling import RowFilter
from fastvlm_mlx.inputs.turned import TurnedImage
from fastvlm_mlx.machine import cpu_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_BAND_PIXELS = 1 << 24
_GRAIN = 4
"""Parts begin and end at multiples of as many outputs."""
_TURNED_PIXELS = 1 << 20
"""Parts that are turned over have about as many, so that they stay in the processor's cache."""
_FEW_COLUMNS = 64
"""A picture that takes fewer columns of outputs is resized in bands: in parts, most of the work would be black."""


def resize(picture: TurnedImage, resolution: int) -> NDArray[np.uint8]:
    """Centres the upright picture on a black square and resizes it to (R, R, 3), as `preprocess` does."""
    width, side = picture.size[0], max(picture.size)
    many_columns = width * resolution >= _FEW_COLUMNS * side
    if many_columns and _parts_are_exact(side, resolution):
        return _in_parts(picture, resolution)
    return _in_bands(picture.upright(), resolution)


def _parts_are_exact(side: int, resolution: int) -> bool:
    """Whether Pillow filters a part of a square of `side` pixels with the very weights that it uses for the whole.

    Weights follow from the distances of pixels to the centres of outputs, which are odd multiples of
    side / (2 · resolution). If that is a binary fraction, as always at 256, 512 and 1024, Pillow's float64 holds these
    distances exactly, wherever a part begins. Its float32 holds where a part begins, a multiple of
    `_GRAIN` · side / resolution, if side · resolution / `_GRAIN` has no more than 24 bits.
    """
    return (side << 12) % resolution == 0 and side * resolution <= _GRAIN << 24


class _Side:
    """One side of the square: which outputs see the picture, and which of them see nothing else."""

    def __init__(self, length: int, side: int, resolution: int) -> None:
        self._side, self._resolution = side, resolution
        self._scale = side / resolution
        self._reach = math.ceil(2 * max(self._scale, 1.0)) + 1
        self._start, self._end = (side - length) // 2, (side - length) // 2 + length

    def cuts(self, parts: int) -> list[int]:
        """Where to cut the outputs that see the picture: those that see no black, in `parts`, are kept from others."""
        if self._end - self._start == self._side:
            first, low, high, last = 0, 0, self._resolution, self._resolution
        else:
            first, last = self._output_below(self._start - self._reach), self._output_above(self._end + self._reach)
            low, high = self._output_above(self._start + self._reach), self._output_below(self._end - self._reach)
        step = max(-(-(high - low) // (parts * _GRAIN)) * _GRAIN, _GRAIN)
        inner = [*range(low, high, step), high] if low < high else []
        return sorted({first, *inner, last})

    def part(self, start: int, end: int, *, whole: bool = True) -> tuple[int, int, float, float]:
        """The pixels of the picture, and of the black around it, that outputs need, and the place of these among them.

        That is the whole picture if no black is needed, which saves a copy, unless the whole is not wanted.
        """
        low, high = start * self._side / self._resolution, end * self._side / self._resolution
        first, last = max(math.floor(low) - self._reach, 0), min(math.ceil(high) + self._reach, self._side)
        if whole and self._start <= first and last <= self._end:
            first, last = self._start, self._end
        return first - self._start, last - self._start, low - first, high - first

    def _output_below(self, pixel: int) -> int:
        return max(math.floor(pixel / self._scale) // _GRAIN * _GRAIN, 0)

    def _output_above(self, pixel: int) -> int:
        return min(-(-math.ceil(pixel / self._scale) // _GRAIN) * _GRAIN, self._resolution)


def _in_parts(picture: TurnedImage, resolution: int) -> NDArray[np.uint8]:
    """Resizes where parts are exact: each thread takes some columns, and only pixels near a black edge are copied.

    The rows of a picture that is stored sideways are filtered as the columns that they are there. If these run upwards,
    parts are copied, turned over.
    """
    from PIL.Image import Transpose

    sideways, turn = picture.sideways, picture.turn
    image = picture.stored if sideways else picture.upright()
    upwards, leftwards = (turn in (t, Transpose.TRANSVERSE) for t in (Transpose.ROTATE_270, Transpose.ROTATE_90))
    across, down = (_Side(length, max(picture.size), resolution) for length in picture.size)
    rows = list(pairwise(down.cuts(1)))
    pixels = np.zeros((resolution, resolution, 3), dtype=np.uint8)

    def fill(start: int, end: int) -> None:
        # One pass at a time, since Pillow may choose the order of two.
        part = across.part(start, end, whole=not upwards)
        narrow = _filter(image, int(sideways), part, end - start, turned_over=upwards)
        if leftwards:
            narrow = narrow.transpose(Transpose.FLIP_LEFT_RIGHT)
        for first, last in rows:
            levels = np.asarray(_filter(narrow, int(not sideways), down.part(first, last), last - first))
            pixels[first:last, start:end] = levels.swapaxes(0, 1) if sideways else levels

    parts = max(cpu_threads(), image.width * image.height // _TURNED_PIXELS if upwards else 0)
    _in_threads(fill, pairwise(across.cuts(parts)))
    return pixels


def _filter(
    image: Image, axis: int, part: tuple[int, int, float, float], outputs: int, *, turned_over: bool = False
) -> Image:
    """One pass over a part of an image, along its rows (axis 0) or its columns (axis 1), maybe turned over."""
    from PIL.Image import Resampling, Transpose

    start, end, low, high = part
    if turned_over:
        start, end = image.size[axis] - end, image.size[axis] - start
    width, height = image.size
    source = _crop(image, (0, start, width, end) if axis else (start, 0, end, height))
    if turned_over:
        source = source.transpose(Transpose.FLIP_TOP_BOTTOM)
    size, box = ((width, outputs), (0, low, width, high)) if axis else ((outputs, height), (low, 0, high, height))
    return source.resize(size, Resampling.BICUBIC, box=box)


def _in_bands(image: Image, resolution: int) -> NDArray[np.uint8]:
    """Resizes at any resolution: rows first, then columns, in bands, of which those of rows are padded with black.

    The black beside a tall picture is not filtered.
    """
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    tall = RowFilter(left=left, width=width, side=side, resolution=resolution) if 5 * width < 2 * height else None
    first, count = (tall.first, tall.count) if tall else (0, resolution)
    narrow = Image.new("RGB", (count, side))
    pixels = np.zeros((resolution, resolution, 3), dtype=np.uint8)

    def filter_rows(start: int, end: int) -> None:
        if tall:
            filtered = Image.fromarray(tall(np.asarray(image.crop((0, start, width, end)))))
        else:
            band = image.crop((-left, start, side - left, end))  # black outside the image
            filtered = band.resize((resolution, end - start), Image.Resampling.BICUBIC)
        narrow.paste(filtered, (0, top + start))

    def filter_columns(start: int, end: int) -> None:
        band = narrow.crop((start, 0, end, side)).resize((end - start, resolution), Image.Resampling.BICUBIC)
        pixels[:, first + start : first + end] = np.asarray(band)

    _in_threads(filter_rows, _bands(height, side))
    _in_threads(filter_columns, _bands(count, side))
    return pixels


def _bands(length: int, side: int) -> list[tuple[int, int]]:
    """Cuts `length` rows (or columns) of `side` pixels into a band for each thread, or more if those are large."""
    step = max(1, min(-(-length // cpu_threads()), _BAND_PIXELS // side))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _crop(image: Image, box: tuple[int, int, int, int]) -> Image:
    """The pixels in `box`, black outside the image; the image itself if that is all of it."""
    return image if box == (0, 0, *image.size) else image.crop(box)


def _in_threads(work: Callable[[int, int], None], spans: Iterable[tuple[int, int]]) -> None:
    with ThreadPoolExecutor(cpu_threads()) as threads:
        for done in [threads.submit(work, *span) for span in spans]:
            done.result()
