"""Names on a command line that stand for more than one picture file: what is meant, found out at little cost.

`film.mp4#t=12.5`, `#t=10,20` (W3C media fragments), `paper.pdf#2`, `paper.pdf#1-3,7`, `@screen`, `@clipboard`,
`@camera`, `@test`, `lavfi:GRAPH` and rtsp URLs. Everything else is looked at by its content.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable

HEAD_BYTES = 2048
"""Bytes at the beginning of a file that tell its kind."""
MOST_PARTS = 10_000
"""The most pages or moments that one name may stand for."""

PDF, FILM, ANIMATION = "PDF", "film", "animation"

_LIVE = ("@screen", "@window", "@camera", "@clipboard", "@test")
_LIVE_SCHEMES = ("lavfi:", "rtsp://", "rtsps://")
_WEB = ("http://", "https://")
_DATA = ("data:application/pdf", "data:video/")
_MOVING_DATA = ("data:image/gif", "data:image/webp", "data:image/png", "data:image/apng")
# Ends of the paths of web addresses whose content is fetched to see whether it holds several pictures.
_EXTENSIONS = (".pdf", ".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".ts", ".gif", ".webp", ".apng")
# Not compiled here: a name without a # does without them.
_PAGES = r"(?:page=)?([0-9]{1,9}(?:-[0-9]{0,9})?(?:,[0-9]{1,9}(?:-[0-9]{0,9})?)*)"
_SECONDS = r"([0-9]{1,9}(?::[0-9]{1,2}){0,2}(?:\.[0-9]{0,9})?)s?"
_TIMES = rf"t=(?:npt:)?(?:{_SECONDS})?(?:,(?:{_SECONDS})?)?"
# What begins a file of the format that FFmpeg calls mov, but is a picture.
_STILL = b"avif avis heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 crx  jp2  jpx  jpm ".split(b" ")
_FILM_MARKS = (
    *(b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b".RMF", b"\x06\x0e\x2b\x34"),
    *(b"0&\xb2u\x8ef\xcf\x11", b"nut/multimedia container", b"YUV4MPEG2", b"DKIF"),
)


class Fragment(NamedTuple):
    """What follows the # of a name.

    Attributes:
        text: As it was written, with its #.
        pages: First and last page of each range, from 1; a last one of None is the last of the document.
        start: Seconds from which on a film is meant; None for pages.
        end: Seconds until which it is meant; None is a moment, infinity the rest of the film.
    """

    text: str
    pages: tuple[tuple[int, int | None], ...] = ()
    start: float | None = None
    end: float | None = None

    @classmethod
    def of(cls, text: str) -> Fragment | None:
        """What a text behind a # means; None if it is neither pages nor times."""
        if match := re.fullmatch(_PAGES, text):
            ranges = [part.partition("-") for part in match[1].split(",")]
            pages = tuple(
                (int(first), int(last) if last else None if dash else int(first)) for first, dash, last in ranges
            )
            return cls(f"#{text}", pages) if all(0 < first <= (last or first) for first, last in pages) else None
        match = re.fullmatch(_TIMES, text)
        if match is None or (match[1] is None and match[2] is None):
            return None
        start = _seconds(match[1]) if match[1] else 0.0
        end = _seconds(match[2]) if match[2] else math.inf if text.endswith(",") else None
        return cls(f"#{text}", (), start, end) if end is None or end > start else None


class Part(NamedTuple):
    """One picture of a bundle.

    Attributes:
        fragment: What names it behind the name of the file: `#t=12.5`, `#3`.
        time: Seconds of a film.
        page: Of a document, from 1.
    """

    fragment: str
    time: float | None = None
    page: int | None = None


def _seconds(text: str) -> float:
    """The seconds in `12.5`, `1:30` or `1:02:03`."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def moment(seconds: float) -> str:
    """The fragment of a moment: `#t=12.5`."""
    return f"#t={f'{seconds:.3f}'.rstrip('0').rstrip('.')}"


def page_ranges(text: str) -> tuple[tuple[int, int | None], ...]:
    """The ranges in `1-3,7` or `all`; none if it is something else."""
    fragment = None if "=" in text else Fragment.of("1-" if text == "all" else text)
    return fragment.pages if fragment else ()


def is_web(name: str) -> bool:
    """Whether a name is an http(s) URL."""
    return name[:8].lower().startswith(_WEB)


def is_live(name: str) -> bool:
    """Whether a name means what a device shows now, not a file; a file of that name comes first."""
    live = name.partition(":")[0] in _LIVE if name.startswith("@") else name.lower().startswith(_LIVE_SCHEMES)
    return live and not os.path.lexists(name)


def split_name(name: str) -> tuple[str, Fragment | None]:
    """A name without its fragment, and that; a file whose name has a # in it needs none.

    Raises:
        ImageError: If what follows the # of an existing file is neither pages nor times.
    """
    base, mark, text = name.rpartition("#")
    if not mark or not base or name[:5].lower() == "data:" or os.path.lexists(name):
        return name, None
    fragment = Fragment.of(text)
    if is_web(name):
        return (base, fragment) if fragment else (name, None)
    if not os.path.lexists(os.path.expanduser(base)):
        return name, None
    if fragment is None:
        raise ImageError(
            f"{printable(name)}: {printable('#' + text, 40)} is neither pages, such as #2 or #1-3, nor a time in "
            "seconds, such as #t=12.5 or #t=10,20"
        )
    return base, fragment


def kind_of(head: bytes) -> str:
    """What a file holds that begins with these bytes: a PDF, a film, a possible animation; empty for all else."""
    if b"%PDF-" in head[:1024]:
        return PDF
    if head[4:8] == b"ftyp":
        return "" if head[8:12].rstrip() in _STILL else FILM
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot") or head.startswith(_FILM_MARKS):
        return FILM
    if head[:4] == b"RIFF":
        return (
            FILM
            if head[8:11] == b"AVI"
            else ANIMATION
            if head[8:16] == b"WEBPVP8X" and head[20:21] > b"" and head[20] & 2
            else ""
        )
    if head[:6] in (b"GIF87a", b"GIF89a") or (head.startswith(b"\x89PNG") and b"acTL" in head):
        return ANIMATION
    is_stream = len(head) > 564 and all(head[at] == 0x47 for at in (0, 188, 376, 564))  # packets of an MPEG stream
    return FILM if is_stream else ""


def kind_of_file(path: str) -> str:
    """What an ordinary file holds, as by `kind_of`; empty if it cannot be read, which reading it will say."""
    try:
        if path.startswith("~") and not os.path.lexists(path):
            path = os.path.expanduser(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            # Of a pipe, nothing may be read: its bytes come once.
            return kind_of(file.read(HEAD_BYTES)) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else ""
    except (OSError, ValueError):
        return ""


def is_plain(source: object, *, animations: bool = False) -> bool:
    """Whether a source is one picture, as far as its first bytes show; a web address goes by its path.

    Args:
        source: A name, or encoded bytes.
        animations: Whether an animation counts as several pictures.
    """
    several = (PDF, FILM, ANIMATION) if animations else (PDF, FILM)
    if isinstance(source, (bytes, bytearray)):
        return kind_of(bytes(source[:HEAD_BYTES])) not in several
    if not isinstance(source, str):
        return True
    if source[:5].lower() == "data:":
        return not source[:40].lower().startswith(_DATA + _MOVING_DATA if animations else _DATA)
    if is_live(source):
        return False
    base, fragment = split_name(source)
    if is_web(source):
        return fragment is None and not _web_path(base).endswith(_EXTENSIONS if animations else _EXTENSIONS[:-3])
    return fragment is None and kind_of_file(base) not in several


def _web_path(url: str) -> str:
    from urllib.parse import unquote, urlsplit

    try:
        return unquote(urlsplit(url).path).lower()
    except ValueError:
        return ""


def spread(count: int, start: float, end: float) -> Iterator[float]:
    """Yields the middles of `count` equal parts of a stretch of time."""
    for number in range(count):
        yield start + (number + 0.5) * (end - start) / count
