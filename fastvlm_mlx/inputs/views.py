"""What a name on a command line shows: one picture, or those of a film, an animation, a PDF, a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.bundles import Wanted, as_encoded, open_bundle
from fastvlm_mlx.inputs.clipboard import CLIPBOARD, paste
from fastvlm_mlx.inputs.fragments import MOST_PARTS, Fragment, Part, split_name
from fastvlm_mlx.inputs.named import ANIMATION, FILM, HEAD_BYTES, PDF, is_live, is_web, kind_of, kind_of_file
from fastvlm_mlx.inputs.screen import grab, is_screen, parse
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.inputs.video import open_stream

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.sources import ImageSource

USUAL_FRAMES = 4
"""How many frames of a film are looked at, unless something else is requested."""
MOST_TOGETHER = 64
"""The most pictures of a film or PDF that one question is about; more would not fit into memory and context."""
SHARPNESS = 2
"""How many pixels of a page are drawn for each that the model sees; fewer blur small print, more change nothing."""
USUAL_RESOLUTION = 1024


class View(NamedTuple):
    """A picture to look at.

    Attributes:
        source: The picture.
        name: What it is called: the file's name, with the fragment of a part behind it.
        part: Which part of a file it is; None if it is all of it.
    """

    source: ImageSource | Encoded
    name: str
    part: Part | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is looked at where a name holds several pictures and does not say which.

    Attributes:
        frames: So many frames of a film or an animation; None is `USUAL_FRAMES`, and of an animation the first.
        every: A frame at each so many seconds instead.
        pages: Ranges of pages; None is the first page, or with `whole` all of them.
        whole: Whether all pages are looked at.
        resolution: At which the model looks; None if it is not known yet.
        most: How many pictures one name may stand for.
    """

    frames: int | None = None
    every: float | None = None
    pages: tuple[tuple[int, int | None], ...] | None = None
    whole: bool = False
    resolution: int | None = None
    most: int = MOST_PARTS

    @property
    def wanted(self) -> Wanted:
        """The same with its defaults filled in."""
        pages: tuple[tuple[int, int | None], ...] = ((1, None),) if self.whole else ((1, 1),)
        return Wanted(
            frames=self.frames or USUAL_FRAMES,
            every=self.every,
            pages=self.pages or pages,
        )

    @property
    def side(self) -> int:
        """The pixels of a page's longer side."""
        return SHARPNESS * (self.resolution or USUAL_RESOLUTION)

    @property
    def moves(self) -> bool:
        """Whether more than the first frame of an animation is wanted."""
        return self.frames is not None or self.every is not None


def views(
    source: Any, choice: Choice, *, notify: Callable[[str], None] | None = None, name: str = "image"
) -> Iterator[View]:
    """Yields what a source shows, one after another.

    Args:
        source: A name as the user of this machine gives it, never one that comes from strangers; or encoded bytes.
        choice: What is looked at where it holds several pictures.
        notify: Called with what was chosen of many, and if a film is damaged.
        name: What bytes are called.

    Raises:
        ImageError: If it cannot be read.
    """
    if isinstance(source, (bytes, bytearray)):
        yield from _of_data(Encoded(bytes(source), name), None, choice, notify)
    elif not isinstance(source, str):
        yield View(source, printable(source))
    elif is_live(source):
        yield from _live(source, choice, notify)
    else:
        base, fragment = split_name(source)
        if base[:5].lower() == "data:" or is_web(base):
            yield from _of_data(read(base), fragment, choice, notify)
            return
        path = os.path.expanduser(base) if base.startswith("~") and not os.path.lexists(base) else base
        kind = kind_of_file(path)
        if kind in (PDF, FILM) or (kind == ANIMATION and (fragment or choice.moves)):
            yield from _of_bundle(path, kind, printable(base), fragment, choice, notify)
        else:
            _refuse_fragment(base, fragment)
            yield View(source if fragment is None else base, source)


def _of_data(
    encoded: Encoded, fragment: Fragment | None, choice: Choice, notify: Callable[[str], None] | None
) -> Iterator[View]:
    kind = kind_of(encoded.data[:HEAD_BYTES])
    if kind in (PDF, FILM) or (kind == ANIMATION and (fragment or choice.moves)):
        yield from _of_bundle(encoded.data, kind, encoded.name, fragment, choice, notify)
    else:
        _refuse_fragment(encoded.name, fragment)
        yield View(encoded, encoded.name)


def _refuse_fragment(name: str, fragment: Fragment | None) -> None:
    if fragment is not None:
        raise ImageError(f"{printable(name)}{fragment.text}: it is neither a film nor a PDF, so it has no such part")


def _of_bundle(
    source: str | bytes,
    kind: str,
    name: str,
    fragment: Fragment | None,
    choice: Choice,
    notify: Callable[[str], None] | None,
) -> Iterator[View]:
    with open_bundle(source, kind, name, side=choice.side, notify=notify) as bundle:
        parts = bundle.parts(choice.wanted, fragment)
        if len(parts) > choice.most:
            raise ImageError(f"{name}: {len(parts):,} pictures are more than {choice.most}, the most of one question")
        if notify is not None and fragment is None and (said := _chosen(bundle.extent, parts, kind, choice)):
            notify(f"{name}: {said}")
        for part in parts:
            yield View(bundle.picture(part), f"{name}{part.fragment}", part)


def _chosen(extent: str, parts: list[Part], kind: str, choice: Choice) -> str:
    """What was chosen of a bundle without being told; empty if it was told, or there was no choice."""
    if kind == PDF:
        return "" if choice.pages or choice.whole or extent == "1 page" else f"page 1 of {extent}; add #2 or #1-3"
    return "" if choice.moves else f"{len(parts)} frames of {extent}; --frames or #t=1.5 takes others"


def _live(name: str, choice: Choice, notify: Callable[[str], None] | None) -> Iterator[View]:
    """What a device shows now."""
    if name == CLIPBOARD:
        pasted = paste()
        if isinstance(pasted, bytes):
            yield from _of_data(Encoded(pasted, name), None, choice, notify)
        else:
            yield from views(pasted, choice, notify=notify)
    elif is_screen(name):
        yield View(as_encoded(grab(parse(name)), name), name)
    else:
        with open_stream(name, notify=notify) as stream:
            frame = next(iter(stream), None)
        if frame is None:
            raise ImageError(f"{printable(name)}: gives no picture")
        yield View(as_encoded(frame.pixels, printable(name)), name)
