"""Decoding by FFmpeg (PyAV): an address that it can open -> frames with their times, and upright RGB of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EINVAL
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.formats import MAX_PIXELS
from fastvlm_mlx.inputs.frames import optional

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTANT = 1e-4
"""Seconds; times that are closer are the same."""
USUAL_RATE = 25.0
"""Frames a second of a film that gives neither times nor a rate."""

# Errors in a row after which a damaged film is taken to be at its end.
_MOST_ERRORS = 200
# Formats in which frames follow one another without a pause, and the seconds, or frames, from which one is a hole.
_STEADY = ("mpegts", "mpeg")
_HOLE_SECONDS, _HOLE_STEPS = 1.0, 10
# Seconds that decoding on may take in films without an index; beyond, a seek is tried.
_WORTH_A_SEEK = 8.0
# Seconds that `close` waits for a thread that is reading; after that, that thread closes.
_PATIENCE = 2.0
_PAUSE = 0.003


@dataclass(frozen=True, kw_only=True)
class Place:
    """What FFmpeg opens.

    Attributes:
        address: A path, URL, device or graph, or an open file.
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


class Decoder:
    """The frames of what FFmpeg opens, one after another.

    Args:
        place: What to open.
        notify: Called once if the film is damaged or incomplete.

    Attributes:
        live: Whether frames come by the clock.
        duration: Seconds; None if it is live or unknown.
        step: Seconds of a frame, by the rate that the film says it has.

    Raises:
        ImageError: If it cannot be opened, or has no video track.
    """

    def __init__(self, place: Place, notify: Callable[[str], None] | None = None) -> None:
        self._av: Any = optional("av", f"{place.name}: reading films and cameras", "video")
        self._place, self.notify = place, notify
        self._lock, self._closed, self._opened = Lock(), False, time.monotonic()
        self._errors = 0
        self._images: list[Any] = []
        self._begin()
        duration = self._container.duration
        self.duration: float | None = duration / 1e6 if duration and duration > 0 else None
        # A network stream without an end comes by the clock, too.
        self.live = place.device or (self.duration is None and "://" in str(place.address))
        if self.live:
            self.duration = None
        rate = self._track.average_rate or self._track.guessed_rate
        self.step = 1 / float(rate) if rate and rate > 0 else 1 / USUAL_RATE

    def _begin(self) -> None:
        """Opens the container, and finds its video track."""
        self._container: Any = self._open()
        try:
            self._track: Any = self._best_track()
        except BaseException:
            self._container.close()
            raise
        self._track.thread_type = "SLICE" if self._place.device else "AUTO"
        begin = self._container.start_time
        self._origin = begin / 1e6 if begin is not None else 0.0
        self._start_anew()

    def _start_anew(self) -> None:
        """Forgets what was read before a jump."""
        self._last: float | None = None
        self._shift = 0.0
        self._images = []
        self._packets = self._demux()

    def _demux(self) -> Iterator[Any]:
        packets: Iterator[Any] = iter(self._container.demux(self._track))
        return packets

    def _open(self) -> Any:
        place = self._place
        timeout = None if place.timeout is None else (place.timeout, place.timeout)
        if hasattr(place.address, "seek"):
            place.address.seek(0)
        try:
            return self._av.open(place.address, format=place.format, container_options=place.options, timeout=timeout)
        except (self._av.error.FFmpegError, OSError, ValueError, MemoryError) as err:
            raise ImageError(f"{place.name}: {self._reason(err)}") from err

    def _reason(self, err: BaseException) -> str:
        if (explained := self._place.explain(err)) is not None:
            return explained
        if isinstance(err, self._av.error.ExitError) and self._place.timeout is not None:
            return f"nothing has come for {self._place.timeout:g} s"
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
            raise ImageError(f"{self._place.name}: has no video track")
        known = [each for each in tracks if each.codec_context is not None]
        if not known:
            raise ImageError(f"{self._place.name}: its video is of a kind that cannot be decoded")
        best = self._container.streams.best("video")
        track = best if best in known else known[0]
        self._check_size(track.codec_context.width or 0, track.codec_context.height or 0)
        return track

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{self._place.name}: its frames have more than {MAX_PIXELS:,} pixels, the most that is read"
            )

    def next_frame(self) -> tuple[Any, float] | None:
        """The next frame as FFmpeg has it, and its time; None at the end, or when it was closed.

        Raises:
            ImageError: If a live source fails or ends.
        """
        while not self._images:
            images = self._decode_next()
            if images is None:
                return None
            self._images = images
        image = self._images.pop(0)
        return image, self._time(image)

    def _decode_next(self) -> list[Any] | None:
        """The frames of the next packet; None at the end."""
        errors = self._av.error
        with self._lock:
            if self._closed:
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
            if self._closed:  # while this thread was reading
                self._container.close()
                return None
        if images:
            self._errors = 0
            if not self.live and any(getattr(image, "is_corrupt", False) for image in images):
                self._complain("damaged")
        elif images is None:
            self._at_end()
        elif self.live:
            time.sleep(_PAUSE)
        return images

    def _failed(self, err: BaseException) -> list[Any] | None:
        """What a failed reading leaves: nothing of this packet, or the end.

        Raises:
            ImageError: If a live source fails.
        """
        if self._closed:  # which is why it failed, or no longer of interest
            return None
        damaged = isinstance(err, (self._av.error.InvalidDataError, ValueError))
        if self.live and not damaged:
            raise ImageError(f"{self._place.name}: no more frames; {self._reason(err)}") from err
        self._complain("damaged" if damaged else f"cannot be read on ({printable(err)})")
        self._errors += 1
        self._packets = self._demux()
        return [] if damaged and self._errors < _MOST_ERRORS else None

    def _complain(self, what: str) -> None:
        """Says once what is wrong with a film."""
        if self.notify is not None:
            notify, self.notify = self.notify, None
            after = f" after {self._last:.1f} s" if self._last is not None else ""
            notify(f"{self._place.name}: {what}{after}; what can be read is used")

    def _at_end(self) -> None:
        """Says if a film ends long before it should, or fails if a live source does."""
        if self.live:
            raise ImageError(f"{self._place.name}: no more frames; the source has ended or was unplugged")
        length = self._track.duration
        expected = float(length * self._track.time_base) if length and self._track.time_base else 0.0
        if not expected and len(self._container.streams) == 1:
            expected = self.duration or 0.0
        if self._last is not None and self._last + self.step < expected - max(1.0, 0.02 * expected):
            self._complain(f"incomplete: it should last {expected:.1f} s, and ends")

    def _time(self, image: Any) -> float:
        """When a frame begins; later than the one before it, whatever the film says."""
        if self.live:
            return time.monotonic() - self._opened
        ticks = image.pts if image.pts is not None else image.dts
        last = self._last
        if ticks is None or image.time_base is None:
            at = 0.0 if last is None else last + self.step
        else:
            at = max(0.0, float(ticks * image.time_base) - self._origin) + self._shift
            if last is not None and at <= last:
                self._shift += last + self.step - at
                at = last + self.step
            elif last is not None and self._is_hole(at - last):
                self._complain("damaged")
        self._last = at
        return at

    def _is_hole(self, seconds: float) -> bool:
        """Whether so long a time between two frames shows that some are missing."""
        steady = self._container.format.name in _STEADY
        return steady and seconds > max(_HOLE_SECONDS, _HOLE_STEPS * self.step)

    def pixels(self, image: Any) -> NDArray[np.uint8]:
        """A frame (H, W, 3) as upright RGB with square pixels.

        Raises:
            ImageError: If it has too many pixels, or does not fit into memory.
        """
        width, height = image.width, image.height
        ratio = self._track.sample_aspect_ratio
        if ratio and 0.1 < ratio < 10:
            width = max(1, round(width * float(ratio)))
        self._check_size(width, height)
        try:
            pixels = image.to_ndarray(format="rgb24", width=width, height=height)
            return np.ascontiguousarray(np.rot90(pixels, k=round(getattr(image, "rotation", 0) / 90) % 4))
        except (self._av.error.FFmpegError, ValueError, MemoryError) as err:
            name = self._place.name
            raise ImageError(f"{name}: a frame of {width}×{height} pixels cannot be read ({printable(err)})") from err

    def is_worth_a_seek(self, here: float, there: float) -> bool:
        """Whether a key frame lies between two times, so that what comes before it need not be decoded."""
        with self._lock:
            entries = None if self._closed else getattr(self._track, "index_entries", None)
            if not entries:
                return there - here > _WORTH_A_SEEK
            first = entries.search_timestamp(self._ticks(here))
            second = entries.search_timestamp(self._ticks(there))
        return bool(second > first >= 0)

    def _ticks(self, moment: float) -> int:
        return int((moment + self._origin) / float(self._track.time_base))

    def seek(self, moment: float) -> bool:
        """Goes to a place in a film before `moment`, as far as the format can; returns whether it could."""
        with self._lock:
            if self._closed:
                return False
            try:
                self._container.seek(self._ticks(max(moment, 0.0)), stream=self._track, backward=True)
            except (self._av.error.FFmpegError, OSError, ValueError, OverflowError):
                return False
            self._start_anew()
        return True

    def rewind(self) -> None:
        """Opens a film anew, and begins at its first frame."""
        with self._lock:
            if not self._closed:
                self._container.close()
                self._begin()

    def last_time(self) -> float:
        """When the last packet of a film begins; reads all of them, and leaves the film at its end."""
        latest, count = 0.0, 0
        try:
            for packet in self._demux():
                if packet.pts is not None and packet.time_base is not None:
                    latest = max(latest, float(packet.pts * packet.time_base) - self._origin)
                elif packet.size:
                    latest, count = max(latest, count * self.step), count + 1
        except (self._av.error.FFmpegError, OSError, ValueError):
            return latest  # it is damaged there
        return latest

    def close(self) -> None:
        """Releases the device or file; a thread that reads at present does so itself if it takes too long."""
        self._closed = True
        if self._lock.acquire(timeout=_PATIENCE):
            try:
                self._container.close()
            finally:
                self._lock.release()
