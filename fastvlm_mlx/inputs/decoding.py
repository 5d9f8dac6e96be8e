"""Decoding by FFmpeg (PyAV): an address that it can open -> upright RGB frames with their times."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EINVAL
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.formats import MAX_PIXELS
from fastvlm_mlx.inputs.frames import Frame, optional

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

USUAL_RATE = 25.0
"""Frames a second of a film that gives neither times nor a rate."""

# Errors in a row after which a damaged film is taken to be at its end.
_MOST_ERRORS = 200
# Seconds that decoding on may take in films without an index; beyond, a seek is tried.
_WORTH_A_SEEK = 8.0
# Seconds that `close` waits for a thread that is reading; after that, this thread closes.
_PATIENCE = 2.0
_PAUSE = 0.003
# Seconds in which a camera gets its exposure right; black frames are left out until then.
_WARM_UP = 1.5
_BLACK = 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """What FFmpeg opens.

    Attributes:
        address: A path, URL, device or graph.
        name: In messages.
        format: FFmpeg's name of the format or kind of device; None lets it look at the content.
        options: FFmpeg's.
        timeout: Seconds that opening and each reading may take; None for ever.
        device: Whether it gives frames by the clock.
        explain: What to say instead of FFmpeg's reason for a failure, if it is known.
        dark: What to say of a device that shows only black; empty for nothing.
    """

    address: Any
    name: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    timeout: float | None = None
    device: bool = False
    explain: Callable[[BaseException], str | None] = lambda _: None
    dark: str = ""


class VideoStream:
    """A `Stream` that FFmpeg decodes.

    Args:
        place: What to open.
        rate: The most frames a second; those that come earlier are left out.
        start: Seconds of a film before the first frame.
        end: Seconds of a film after which no frame begins.
        notify: Called once if the film is damaged or incomplete.

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
        self._av: Any = optional("av", f"{place.name}: reading films and cameras", "video")
        self.name, self._place, self._rate, self._start, self._end = place.name, place, rate, start, end
        self._notify, self._lock, self._closed = notify, Lock(), False
        self._container: Any = self._open()
        try:
            self._track: Any = self._best_track()
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        container, track = self._container, self._track
        track.thread_type = "SLICE" if self._place.device else "AUTO"
        duration = container.duration
        self.duration: float | None = duration / 1e6 if duration and duration > 0 else None
        # A network stream without an end comes by the clock, too.
        self.live = self._place.device or (self.duration is None and "://" in str(self._place.address))
        if self.live:
            self.duration = None
        rate = track.average_rate or track.guessed_rate
        self._step = 1 / float(rate) if rate and rate > 0 else 1 / USUAL_RATE
        begin = container.start_time
        self._origin = begin / 1e6 if begin is not None else 0.0
        self._last: float | None = None
        self._before_seek: float | None = None
        self._shift = 0.0
        self._seekable = not self.live
        self._is_lit = False
        self._errors = 0
        self._opened = time.monotonic()
        if self._start and not self.live:
            self._seek(self._start)
        self._packets = self._demux()
        frames = self._read()
        first = next(frames, None)
        if first is None:
            raise ImageError(f"{self.name}: no frame of it can be decoded{self._from()}")
        height, width = self._pixels(first[0]).shape[:2]
        self.size = (width, height)
        self._frames = itertools.chain([first], frames)

    def _from(self) -> str:
        return f" from {self._start:g} s on; it lasts {self.duration:g} s" if self._start and self.duration else ""

    def _open(self) -> Any:
        place = self._place
        timeout = None if place.timeout is None else (place.timeout, place.timeout)
        try:
            return self._av.open(place.address, format=place.format, container_options=place.options, timeout=timeout)
        except (self._av.error.FFmpegError, OSError, ValueError, MemoryError) as err:
            raise ImageError(f"{self.name}: {self._reason(err)}") from err

    def _reason(self, err: BaseException) -> str:
        if (explained := self._place.explain(err)) is not None:
            return explained
        if isinstance(err, self._av.error.InvalidDataError) or getattr(err, "errno", None) == EINVAL:
            return "not a film that can be read; it is damaged, incomplete or something else"
        return f"cannot be read ({printable(getattr(err, 'strerror', None) or err)})"

    def _best_track(self) -> Any:
        """The film's video track; a cover is none.

        Raises:
            ImageError: If it has none, or its frames are too large.
        """
        attached = getattr(self._av.stream.Disposition, "attached_pic", 0)
        tracks = [each for each in self._container.streams.video if not each.disposition & attached]
        if not tracks:
            raise ImageError(f"{self.name}: has no video track")
        best = self._container.streams.best("video")
        track = best if best in tracks else tracks[0]
        if (track.codec_context.width or 0) * (track.codec_context.height or 0) > MAX_PIXELS:
            raise ImageError(f"{self.name}: its frames have more than {MAX_PIXELS:,} pixels, the most that is read")
        return track

    def __iter__(self) -> Iterator[Frame]:
        """Yields each frame that is due; call it once."""
        due = self._start if not self.live else 0.0
        for image, at in self._frames:
            if self._end is not None and at >= self._end and not self.live:
                return
            if at + 1e-6 < due:
                continue
            pixels = self._pixels(image)
            if self._place.dark and self._is_warming_up(pixels, at):
                continue
            yield Frame(pixels, at)
            if self._rate:
                begin = 0.0 if self.live else self._start
                due = begin + (math.floor((at - begin) * self._rate + 1e-6) + 1) / self._rate
                if self._seekable and self._is_worth_a_seek(at, due):
                    self._seek(due)

    def _is_warming_up(self, pixels: NDArray[np.uint8], at: float) -> bool:
        """Whether a camera has only shown black so far, and may still begin; says so once if it does not."""
        if self._is_lit or pixels[::8, ::8].max() >= _BLACK:
            self._is_lit = True
        elif at > _WARM_UP and self._notify is not None:
            notify, self._notify = self._notify, None
            notify(f"{self.name}: {self._place.dark}")
        return not self._is_lit and at <= _WARM_UP

    def at(self, moment: float) -> Frame | None:
        """The frame that a film shows at `moment`, in seconds; None if there is none there, nor before."""
        self._seek(moment)
        shown: tuple[Any, float] | None = None
        for image, at in self._read():
            if at > moment + 1e-6 and shown is not None:
                break
            shown = image, at
            if at > moment + 1e-6:
                break
        return None if shown is None else Frame(self._pixels(shown[0]), shown[1])

    def _is_worth_a_seek(self, here: float, there: float) -> bool:
        """Whether a key frame lies between two times, so that what comes before it need not be decoded."""
        entries = getattr(self._track, "index_entries", None)
        if not entries:
            return there - here > _WORTH_A_SEEK
        with self._lock:
            if self._closed:
                return False
            first = entries.search_timestamp(self._ticks(here))
            second = entries.search_timestamp(self._ticks(there))
        return bool(second > first >= 0)

    def _ticks(self, moment: float) -> int:
        return int((moment + self._origin) / float(self._track.time_base))

    def _seek(self, moment: float) -> None:
        """Goes to the key frame before `moment`, as far as the film can."""
        with self._lock:
            if self._closed:
                return
            try:
                self._container.seek(self._ticks(max(moment, 0.0)), stream=self._track, backward=True)
            except (self._av.error.FFmpegError, OSError, ValueError, OverflowError):
                self._seekable = False
                return
        self._before_seek, self._last, self._shift = self._last, None, 0.0
        self._packets = self._demux()

    def _demux(self) -> Iterator[Any]:
        packets: Iterator[Any] = iter(self._container.demux(self._track))
        return packets

    def _read(self) -> Iterator[tuple[Any, float]]:
        """Yields decoded frames with their times, until the end or `close`."""
        while True:
            images = self._decode_next()
            if images is None:
                return
            for image in images:
                yield image, self._time(image)

    def _decode_next(self) -> list[Any] | None:
        """The frames of the next packet; None at the end.

        Raises:
            ImageError: If a live source fails.
        """
        errors = self._av.error
        while True:
            with self._lock:
                if self._closed:
                    self._container.close()
                    return None
                try:
                    packet = next(self._packets, None)
                    images = None if packet is None else list(packet.decode())
                except errors.BlockingIOError:  # a device without a frame at present
                    self._packets = self._demux()
                    images = []
                except errors.EOFError:
                    images = None
                except (errors.FFmpegError, OSError, ValueError, MemoryError) as err:
                    images = self._failed(err)
                if self._closed:
                    self._container.close()
                    return None
            if images:
                self._errors = 0
            if images != [] or not self.live:
                if images is None:
                    self._at_end()
                return images
            time.sleep(_PAUSE)

    def _failed(self, err: BaseException) -> list[Any] | None:
        """What a failed reading leaves: nothing of this packet, or the end.

        Raises:
            ImageError: If a live source fails.
        """
        damaged = isinstance(err, (self._av.error.InvalidDataError, ValueError))
        if self.live and not damaged:
            raise ImageError(f"{self.name}: no more frames; {self._reason(err)}") from err
        self._complain("damaged" if damaged else f"cannot be read on ({printable(err)})")
        self._errors += 1
        self._packets = self._demux()
        return [] if damaged and self._errors < _MOST_ERRORS else None

    def _complain(self, what: str) -> None:
        """Says once what is wrong with a film."""
        if self._notify is not None:
            notify, self._notify = self._notify, None
            after = f" after {self._last:.1f} s" if self._last is not None else ""
            notify(f"{self.name}: {what}{after}; what can be read is used")

    def _at_end(self) -> None:
        """Says if a film ends long before it should, or fails if a live source does."""
        if self.live:
            raise ImageError(f"{self.name}: no more frames; the source has ended or was unplugged")
        length = self._track.duration
        if length and self._track.time_base and self._last is not None:
            expected = float(length * self._track.time_base)
            if self._last + self._step < expected - max(1.0, 0.02 * expected):
                self._complain(f"incomplete: it should last {expected:.1f} s, and ends")

    def _time(self, image: Any) -> float:
        """When a frame begins; later than the one before it, whatever the film says."""
        if self.live:
            return time.monotonic() - self._opened
        ticks = image.pts if image.pts is not None else image.dts
        last = self._last
        if ticks is None or image.time_base is None:
            at = 0.0 if last is None else last + self._step
        else:
            at = max(0.0, float(ticks * image.time_base) - self._origin) + self._shift
            if last is None and self._before_seek is not None and at <= self._before_seek:
                self._seekable = False  # it went back instead; never again
            if last is not None and at <= last:
                self._shift += last + self._step - at
                at = last + self._step
        self._last = at
        return at

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        """A decoded frame as upright RGB with square pixels.

        Raises:
            ImageError: If it has too many pixels, or does not fit into memory.
        """
        width, height = image.width, image.height
        ratio = self._track.sample_aspect_ratio
        if ratio and 0.1 < ratio < 10:
            width = max(1, round(width * float(ratio)))
        if width * height > MAX_PIXELS:
            raise ImageError(f"{self.name}: its frames have more than {MAX_PIXELS:,} pixels, the most that is read")
        try:
            pixels = image.to_ndarray(format="rgb24", width=width, height=height)
            return np.ascontiguousarray(np.rot90(pixels, k=round(getattr(image, "rotation", 0) / 90) % 4))
        except (self._av.error.FFmpegError, ValueError, MemoryError) as err:
            raise ImageError(f"{self.name}: a frame of {width}×{height} pixels cannot be read ({err})") from err

    def close(self) -> None:
        """Releases the device or file; a thread that reads at present does so itself if it takes too long."""
        self._closed = True
        if self._lock.acquire(timeout=_PATIENCE):
            try:
                self._container.close()
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
