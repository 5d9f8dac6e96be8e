"""Files that hold several pictures (films, animations, PDFs): which of them are wanted, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import counted, printable
from fastvlm_mlx.inputs.animation import Animation
from fastvlm_mlx.inputs.fragments import MOST_PARTS, Fragment, Part, moment, spread
from fastvlm_mlx.inputs.named import ANIMATION, FILM, PDF
from fastvlm_mlx.inputs.pdf import Document
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.inputs.video import open_film

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which pictures of a bundle are wanted, where its name does not say.

    Attributes:
        frames: So many of a film or animation, evenly spaced.
        every: One of a film at each so many seconds, instead of `frames`.
        pages: Ranges of a document's pages.
    """

    frames: int = 1
    every: float | None = None
    pages: tuple[tuple[int, int | None], ...] = ((1, 1),)


class Bundle(Protocol):
    """An open file with several pictures; a context manager.

    Attributes:
        name: In messages.
        extent: How much there is: `12.5 s`, `3 pages`.
    """

    name: str
    extent: str

    def parts(self, wanted: Wanted, fragment: Fragment | None = None) -> list[Part]:
        """The pictures that are wanted, or those that a fragment names.

        Raises:
            ImageError: If there are none such, or too many.
        """

    def picture(self, part: Part) -> Encoded:
        """One of them, decoded.

        Raises:
            ImageError: If it cannot be read.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_bundle(
    source: str | bytes, kind: str, name: str, *, side: int = 2048, notify: Callable[[str], None] | None = None
) -> Bundle:
    """Opens a file with several pictures.

    Args:
        source: Its path or its content.
        kind: What `named.kind_of` says it is.
        name: In messages.
        side: The pixels of a page's longer side.
        notify: Called once if it is damaged, but can be read in part.

    Raises:
        ImageError: If it cannot be read, or what reads it is not installed.
    """
    if kind == PDF:
        return PDFBundle(source, name, side)
    if kind == ANIMATION:
        return AnimationBundle(source, name)
    assert kind == FILM, kind
    return FilmBundle(source, name, notify=notify)


def as_encoded(pixels: NDArray[np.uint8], name: str) -> Encoded:
    """Pixels (H, W, 3) as a picture that is encoded and decoded at once (PPM)."""
    height, width, _ = pixels.shape
    return Encoded(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes(), name)


class _Closing:
    """Closes `_open` at the end of a `with`."""

    _open: Any

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class FilmBundle(_Closing):
    """The frames of a film."""

    def __init__(self, source: str | bytes, name: str, *, notify: Callable[[str], None] | None = None) -> None:
        self.name = name
        self._open = open_film(source, name, notify=notify)
        self.extent = f"{self._open.length():.4g} s"

    def parts(self, wanted: Wanted, fragment: Fragment | None = None) -> list[Part]:
        """The moments that are wanted, or those within a fragment."""
        return _moments(self.name, self._open.length(), wanted, fragment)

    def picture(self, part: Part) -> Encoded:
        """The frame that the film shows at a moment."""
        frame = self._open.at(part.time or 0.0)
        name = f"{self.name}{part.fragment}"
        if frame is None:
            raise ImageError(f"{name}: no frame of it can be decoded there")
        return as_encoded(frame.pixels, name)


class AnimationBundle(_Closing):
    """The frames of an animated GIF, WebP or PNG."""

    def __init__(self, source: str | bytes, name: str) -> None:
        self.name = name
        self._open = Animation(source, name)
        self.extent = f"{self._open.length:.4g} s"

    def parts(self, wanted: Wanted, fragment: Fragment | None = None) -> list[Part]:
        """The moments that are wanted, or those within a fragment; one if it is a picture that does not move."""
        length = self._open.length
        return _moments(self.name, length, wanted, fragment) if length else [Part("", 0.0)]

    def picture(self, part: Part) -> Encoded:
        """The frame that the animation shows at a moment."""
        return as_encoded(self._open.at(part.time or 0.0), f"{self.name}{part.fragment}")


class PDFBundle(_Closing):
    """The pages of a PDF."""

    def __init__(self, source: str | bytes, name: str, side: int) -> None:
        self.name = name
        self._open = Document(source, name)
        self.extent = counted(self._open.pages, "page")
        self._side = side

    def parts(self, wanted: Wanted, fragment: Fragment | None = None) -> list[Part]:
        """The pages that are wanted, or those that a fragment names, each once."""
        if fragment is not None and not fragment.pages:
            raise ImageError(f"{self.name}{fragment.text}: a PDF has pages, not times; name one as #2")
        count = self._open.pages
        pages: dict[int, None] = {}
        for first, last in fragment.pages if fragment else wanted.pages:
            if first > count:
                if fragment is None and last is None:
                    continue
                raise ImageError(f"{self.name}: there is no page {first}; it has {self.extent}")
            pages |= dict.fromkeys(range(first, min(last or count, count) + 1))
        _check_count(self.name, len(pages), "pages")
        return [Part(f"#{page}", page=page) for page in pages]

    def picture(self, part: Part) -> Encoded:
        """A page as a picture."""
        assert part.page is not None
        return as_encoded(self._open.render(part.page, self._side), f"{self.name}{part.fragment}")


def _moments(name: str, length: float, wanted: Wanted, fragment: Fragment | None) -> list[Part]:
    """The moments of a film that are wanted."""
    start, end = 0.0, length
    if fragment is not None:
        if fragment.start is None:
            raise ImageError(f"{name}{fragment.text}: it has moments, not pages; name one as #t=12.5")
        if fragment.start > length:
            raise ImageError(f"{name}{fragment.text}: is after its end; it lasts {length:.4g} s")
        if fragment.end is None:
            return [Part(moment(fragment.start), fragment.start)]
        start, end = fragment.start, min(fragment.end, length)
    if wanted.every is None:
        times: Iterator[float] = spread(wanted.frames, start, end)
        _check_count(name, wanted.frames, "frames")
    else:
        count = max(1, math.ceil((end - start) / wanted.every - 1e-6))
        _check_count(name, count, "frames")
        times = (start + number * wanted.every for number in range(count))
    rounded = dict.fromkeys(round(time, 3) for time in times)
    return [Part(moment(time), time) for time in rounded]


def _check_count(name: str, count: int, what: str) -> None:
    if count > MOST_PARTS:
        raise ImageError(
            f"{printable(name)}: {count:,} {what} are more than {MOST_PARTS:,}, the most at once; name some"
        )
