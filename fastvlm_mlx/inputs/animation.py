"""Animated GIFs, WebPs and PNGs: the frame that is shown at a moment."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import DecompressionBombError

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.formats import DECODER_ERRORS, open_image, quiet
from fastvlm_mlx.inputs.samples import to_turned
from fastvlm_mlx.inputs.sources import Encoded, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_FRAMES = 20_000
"""Frames of an animation beyond which it is not looked at."""
_ERRORS = (*DECODER_ERRORS, DecompressionBombError)
_LONGEST = 1e7
_USUAL = 0.1
"""Seconds that a frame is shown without a duration of its own, as browsers have it."""


class Animation:
    """The frames of an animation with their times, from its path or content.

    Attributes:
        length: Seconds; 0 if it does not move.

    Raises:
        ImageError: If it cannot be read.
    """

    def __init__(self, source: str | bytes, name: str) -> None:
        self._name = name
        data = read(source).data
        self._image: Any = open_image(Encoded(data, name))
        self._begins: list[float] = []
        self.length = 0.0
        with quiet, contextlib.suppress(*_ERRORS):  # up to where it is damaged, it can be used
            for number in range(min(getattr(self._image, "n_frames", 1), MOST_FRAMES)):
                self._image.seek(number)
                if self._image.format == "WEBP":
                    self._image.load()  # only then, its duration is known
                seconds = float(self._image.info.get("duration", 0)) / 1000
                self._begins.append(self.length)
                self.length += seconds if seconds > 0.01 else _USUAL
        if len(self._begins) < 2 or not self.length < _LONGEST:
            self.length = 0.0
        self._image = open_image(Encoded(data, name))

    def at(self, moment: float) -> NDArray[np.uint8]:
        """The frame (H, W, 3) that is shown at a moment.

        Raises:
            ImageError: If it is damaged.
        """
        number = max(0, int(np.searchsorted(self._begins, moment + 1e-6, side="right")) - 1)
        try:
            with quiet:
                self._image.seek(number)
                frame = self._image.copy()
        except _ERRORS as err:
            raise ImageError(f"{self._name}: damaged ({printable(err)}); export it again") from err
        return np.asarray(to_turned(frame, self._name).upright())

    def close(self) -> None:
        """Releases the memory."""
        self._image.close()
