"""Playing: a film or device that FFmpeg opens, as a stream of frames, or the frame at a moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.decoding import INSTANT, Decoder, Place
from fastvlm_mlx.inputs.frames import Frame

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

# Seconds before a moment at which a seek begins, one after another: some formats land behind the key frame.
_MARGINS = (0.0, 2.0, 10.0)
# Seconds in which a camera gets its exposure right; black frames are left out until then.
_WARM_UP = 1.5
_BLACK = 16


class VideoStream:
    """A `Stream` that FFmpeg decodes.

    Args:
        place: What to open.
        rate: The most frames a second; those that come earlier are left out.
        start: Seconds of a film before the first frame.
        end: Seconds of a film after which no frame begins.
        notify: Called once if the film is damaged or incomplete, or a camera shows only black.

    Raises:
        ImageError: If it cannot be opened, or has no frame.
    """

    def __init__(
        self,
        place: Place,
        *,
        rate: float | None = None,
        start: float = 0.0,
        end: float | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self._dark = place.name, place.dark
        self._decoder = Decoder(place, notify)
        self.live, self.duration = self._decoder.live, self._decoder.duration
        self._rate, self._start, self._end = rate, 0.0 if self.live else start, None if self.live else end
        self._seekable, self._is_lit = not self.live, False
        self._shown: tuple[Any, float] | None = None
        try:
            self._ahead = self._decoder.next_frame()
            if self._ahead is None:
                raise ImageError(f"{self.name}: no frame of it can be decoded")
            height, width = self._decoder.pixels(self._ahead[0]).shape[:2]
            self.size = (width, height)
            self._first = self._ahead[1]
            if self._start > self._first:
                self._go_to(self._start, self._first)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Frame]:
        """Yields each frame that is due; call it once."""
        due = self._start
        while (found := self._take()) is not None:
            image, at = found
            if self._end is not None and at >= self._end:
                return
            if at + INSTANT < due:
                continue
            pixels = self._decoder.pixels(image)
            if self._dark and self._is_warming_up(pixels, at):
                continue
            yield Frame(pixels, at)
            if self._rate:
                due = self._start + (math.floor((at - self._start) * self._rate + 1e-6) + 1) / self._rate
                if self._seekable and self._decoder.is_worth_a_seek(at, due):
                    self._go_to(due, at)

    def _take(self) -> tuple[Any, float] | None:
        """The next frame; None at the end."""
        ahead, self._ahead = self._ahead, None
        return ahead or self._decoder.next_frame()

    def _is_warming_up(self, pixels: NDArray[np.uint8], at: float) -> bool:
        """Whether a camera has only shown black so far, and may still begin; says so once if it does not."""
        if self._is_lit or pixels[::8, ::8].max() >= _BLACK:
            self._is_lit = True
        elif at > _WARM_UP and self._decoder.notify is not None:
            notify, self._decoder.notify = self._decoder.notify, None
            notify(f"{self.name}: {self._dark}")
        return not self._is_lit and at <= _WARM_UP

    def _go_to(self, moment: float, here: float) -> None:
        """Goes so far ahead or back that the next frame is the one that is shown at `moment`, or one before it."""
        for margin in _MARGINS if self._seekable else ():
            if not self._decoder.seek(moment - margin):
                break
            self._ahead = self._decoder.next_frame()
            if self._ahead is not None and self._ahead[1] <= max(moment, self._first) + INSTANT:
                # Where a seek ahead leads back, the next one would, too.
                self._seekable = not self._ahead[1] <= here <= moment
                return
            if moment <= margin:
                break
        self._seekable = False
        self._decoder.rewind()
        self._ahead = self._decoder.next_frame()

    def at(self, moment: float) -> Frame | None:
        """The frame that a film shows at `moment`, in seconds; None if it has none.

        Before the first frame it is that one, and after the end the last. In order of time, frames are decoded once.
        """
        shown, ahead = self._shown, self._ahead
        here = ahead[1] if ahead else shown[1] if shown else math.inf
        if shown is not None and moment + INSTANT < shown[1]:
            self._go_to(moment, math.inf)
            shown, ahead = None, self._ahead
        elif ahead and moment > here and self._seekable and self._decoder.is_worth_a_seek(here, moment):
            self._go_to(moment, here)
            shown, ahead = None, self._ahead
        while ahead is not None and ahead[1] <= moment + INSTANT:
            shown, ahead = ahead, self._decoder.next_frame()
        self._shown, self._ahead = shown, ahead
        shown = shown or ahead  # there is nothing before it
        return None if shown is None else Frame(self._decoder.pixels(shown[0]), shown[1])

    def length(self) -> float:
        """The seconds that a film lasts; if it does not say, its packets are read to the end."""
        if self.duration is None:
            self.duration = self._decoder.last_time() + self._decoder.step
            self._decoder.rewind()
            self._shown, self._ahead = None, self._decoder.next_frame()
        return self.duration

    def close(self) -> None:
        """Releases the device or file, also from another thread."""
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
