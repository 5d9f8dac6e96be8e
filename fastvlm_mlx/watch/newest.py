"""The newest frame of a live stream: stale ones are dropped and counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastvlm_mlx.inputs.frames import Frame, Stream

_FRESH = 0.25
"""Seconds since a frame came, within which it shows what is there now."""
_NO_FRAME = 2.0
"""Seconds without a frame after which the picture is taken to be as it was: some sources only send what is new."""
_LATE = 1.0
"""Seconds by which a frame of a film may be late."""


class Arrived(NamedTuple):
    """A frame, and the time of `time.monotonic` at which it was there."""

    frame: Frame
    moment: float


class Newest:
    """Reads a stream in a thread of its own, and keeps one frame: the newest.

    Args:
        frames: Of the stream.
        bell: Called when there is a new frame, and at the end.

    Attributes:
        count: Frames that came.
        dropped: Those of them that a newer one took the place of.
    """

    def __init__(self, frames: Iterator[Frame], bell: Callable[[], None]) -> None:
        self.count = 0
        self.dropped = 0
        self._frames = frames
        self._bell = bell
        self._lock = threading.Lock()
        self._newest: Arrived | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._read, name="fastvlm-frames", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        self._thread.start()

    def take(self) -> Arrived | None:
        """The newest frame; None if it was taken already."""
        with self._lock:
            arrived, self._newest = self._newest, None
        return arrived

    @property
    def ended(self) -> bool:
        """Whether there will be no more frames, and the last one was taken.

        Raises:
            FastVLMError: What ended the stream, if that was an error.
        """
        with self._lock:
            ended = self._ended and self._newest is None
        if ended and self._error is not None:
            raise self._error
        return ended

    def join(self, timeout: float) -> None:
        """Waits for the thread, after the stream was closed."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _read(self) -> None:
        try:
            for frame in self._frames:
                arrived = Arrived(frame, time.monotonic())
                with self._lock:
                    self.count += 1
                    self.dropped += self._newest is not None
                    self._newest = arrived
                self._bell()
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._bell()


class Freshness:
    """Whether it is known what a stream shows now, although the machine or this process may have stood still."""

    def __init__(self) -> None:
        self._waits: float | None = None

    def holds(self, moment: float, now: float) -> bool:
        """Whether the newest frame, of `moment`, has only just come, or none has come in spite of waiting for one."""
        if now - moment <= _FRESH:
            self._waits = None
            return True
        self._waits = now if self._waits is None else self._waits
        return now - self._waits > _NO_FRAME


def paced(stream: Stream, sleep: Callable[[float], object] = time.sleep) -> Iterator[Frame]:
    """The frames of a film at their times by the clock; if it cannot be read so fast, it runs slower."""
    start: float | None = None
    for frame in stream:
        now = time.monotonic()
        start = now - frame.time if start is None else start
        early = start + frame.time - now
        if early > 0:
            sleep(early)
        elif early < -_LATE:
            start -= early
        yield frame
