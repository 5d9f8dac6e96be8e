"""The files of pictures: whether one has changed, its size, and its pixels for several questions."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastvlm_mlx.inputs.formats import DECODER_ERRORS, open_image, quiet
from fastvlm_mlx.inputs.sources import Encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SharedPixels:
    """The picture of several questions, as an array: made once, in the thread that needs it first.

    Args:
        prepare: Returns pixel values (1, R, R, 3). Preparing these once more changes nothing.
    """

    def __init__(self, prepare: Callable[[], NDArray[np.uint8]]) -> None:
        self._prepare = prepare
        self._pixels: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    def __array__(self, *_: object, **__: object) -> NDArray[np.uint8]:
        """The pixels (R, R, 3)."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._prepare()[0]
            return self._pixels


def size_of(encoded: Encoded) -> tuple[int, int] | None:
    """Width and height in pixels, as stored; None if that is no image."""
    try:
        with quiet, open_image(encoded) as image:
            return image.size
    except DECODER_ERRORS:
        return None


def stat_of(path: str) -> tuple[int, ...]:
    """Numbers of which at least one changes when a file is changed or exchanged; none for what is no file here."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns
