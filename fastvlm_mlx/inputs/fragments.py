"""What follows the # of a name: pages of a PDF, or times of a film (W3C media fragments)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable

MOST_PARTS = 10_000
"""The most pages or moments that one name may stand for."""

_PAGES = r"(?:page=)?([0-9]{1,9}(?:-[0-9]{0,9})?(?:,[0-9]{1,9}(?:-[0-9]{0,9})?)*)"
_SECONDS = r"([0-9]{1,9}(?::[0-9]{1,2}){0,2}(?:\.[0-9]{0,9})?)s?"
_TIMES = rf"t=(?:npt:)?(?:{_SECONDS})?(?:,(?:{_SECONDS})?)?"


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


def split_name(name: str) -> tuple[str, Fragment | None]:
    """A name without its fragment, and that; a file whose name has a # in it needs none.

    Raises:
        ImageError: If what follows the # of an existing file is neither pages nor times.
    """
    base, mark, text = name.rpartition("#")
    if not mark or not base or name[:5].lower() == "data:" or os.path.lexists(name):
        return name, None
    fragment = Fragment.of(text)
    if name[:8].lower().startswith(("http://", "https://")):
        return (base, fragment) if fragment else (name, None)
    if not os.path.lexists(os.path.expanduser(base)):
        return name, None
    if fragment is None:
        raise ImageError(
            f"{printable(name)}: {printable('#' + text, 40)} is neither pages, such as #2 or #1-3, nor a time in "
            "seconds, such as #t=12.5 or #t=10,20"
        )
    return base, fragment


def spread(count: int, start: float, end: float) -> Iterator[float]:
    """Yields the middles of `count` equal parts of a stretch of time."""
    for number in range(count):
        yield start + (number + 0.5) * (end - start) / count
