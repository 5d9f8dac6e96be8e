"""Pictures of a conversation, and the paths of pictures that are dropped into a line."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable, readable_bytes
from fastvlm_mlx.inputs.formats import DECODER_ERRORS, open_image, quiet
from fastvlm_mlx.inputs.fragments import Fragment
from fastvlm_mlx.inputs.named import is_plain
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.kinds import PICTURES

_URLS = ("http://", "https://")
_DATA, _FILE = "data:", "file:"
_BLANK = re.compile(r"\s")
_BLANKS = re.compile(r"[ \t]{2,}")
EXTENSIONS = PICTURES | {"mp4", "mov", "m4v", "mkv", "webm", "avi", "pdf"}
"""Of files that can be dropped into a line: pictures, films and PDFs."""
_EXTENSION = re.compile(rf"\.(?:{'|'.join(sorted(EXTENSIONS))})", re.IGNORECASE)
_LONGEST_PATH = 4096
_LONGEST_LINE = 8192
"""The most characters of a line in which pictures are looked for; a longer one is a text that was pasted."""
_PLACES = ("/", "~", "./", "../")
"""What a name begins with that cannot be a word of a question."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture of a conversation.

    Attributes:
        encoded: Its file, as it was read.
        source: Where it is: a path, a URL or a `data:` URL.
        size: Width and height in pixels, as stored.
    """

    encoded: Encoded
    source: str
    size: tuple[int, int]

    @classmethod
    def of(cls, name: str) -> Picture:
        """The picture that a path, a `file:`, `data:` or http(s) URL names; a URL is fetched.

        Raises:
            ImageError: If it cannot be read or is no image.
        """
        if name[:5].lower() == _FILE:
            name = file_path(name)
        if not is_url(name):
            name = os.path.abspath(name if os.path.lexists(name) else os.path.expanduser(name)) if name else name
        encoded = read(name)
        try:
            with quiet, open_image(encoded) as image:
                return cls(encoded=encoded, source=name, size=image.size)
        except DECODER_ERRORS as err:
            raise ImageError(f"{encoded.name}: damaged, incomplete or of an unknown kind; export it again") from err

    @classmethod
    def all_of(
        cls, name: str, *, frames: int | None = None, notify: Callable[[str], None] | None = None
    ) -> list[Picture]:
        """The pictures that a user's name stands for: several for a film or a PDF, what a device shows for `@screen`.

        Args:
            name: As for `of`, or see `fastvlm_mlx.inputs.named`.
            frames: Of a film or an animation; None is the default.
            notify: Is told what was chosen of a film or a PDF.

        Raises:
            ImageError: If it cannot be read or is no image.
        """
        if name[:5].lower() == _FILE:
            name = file_path(name)
        if is_plain(name, animations=frames is not None):
            return [cls.of(name)]
        from fastvlm_mlx.inputs.views import MOST_TOGETHER, Choice, views

        found = []
        for view in views(name, Choice(frames=frames, most=MOST_TOGETHER), notify=notify):
            if not isinstance(view.source, Encoded):
                found.append(cls.of(str(view.source)))
                continue
            with open_image(view.source) as image, io.BytesIO() as file:
                image.convert("RGB").save(file, "PNG", compress_level=1)
                encoded = Encoded(file.getvalue(), view.source.name, "image/png")
                # What it was taken from may change or be a device; so the picture itself is kept.
                source = view.name.rpartition("/")[2] if is_url(view.name) else view.name
                found.append(cls(encoded=encoded, source=source, size=image.size))
        return found

    @property
    def name(self) -> str:
        """What it is called for people."""
        return "pasted picture" if self.source[:5].lower() == _DATA else os.path.basename(self.source) or self.source

    def __str__(self) -> str:
        """Name and size: `photo.jpg, 4032×3024, 2.10 MB`."""
        width, height = self.size
        return f"{printable(self.name, 80)}, {width}×{height}, {readable_bytes(len(self.encoded.data))}"


def is_url(name: str) -> bool:
    """Whether a name is that of something that is not a file."""
    return name.lower().startswith((*_URLS, _DATA))


def file_path(url: str) -> str:
    """The path in a `file:` URL.

    Raises:
        ImageError: If it is on another machine.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"{printable(url)}: is on another machine, {printable(parts.netloc)}; copy it to this one")
    return unquote(parts.path, errors="surrogateescape")


class Dropped(NamedTuple):
    """A line without the pictures that were dropped into it.

    Attributes:
        text: What is left.
        names: Of the pictures, in their order.
    """

    text: str
    names: list[str]


def split_line(line: str) -> Dropped:
    """Finds the pictures in a line: existing files with the extension of one, and what looks like the path of one.

    Terminals write the names of dropped files in several ways: in quotes, with a backslash before each blank, as
    `file:` URLs with percent escapes. All are understood, and so is a name with plain blanks if there is such a file.
    """
    if len(line) > _LONGEST_LINE or not _EXTENSION.search(line):
        return Dropped(line.strip(), [])
    kept: list[str] = []
    names: list[str] = []
    place = 0
    while place < len(line):
        if place == 0 or line[place - 1].isspace():
            readings = _readings(line, place)
            found = next((reading for reading in readings if _is_picture(reading[1], line[place])), None)
            if found is not None:
                place = found[0]
                names.append(found[1])
                continue
        kept.append(line[place])
        place += 1
    text = "".join(kept)
    return Dropped(_BLANKS.sub(" ", text).strip() if names else text.strip(), names)


def _is_picture(name: str, first: str) -> bool:
    """Whether a name that stands in a line means a picture.

    Args:
        name: Without quotes and escapes.
        first: The first character of how it is written.
    """
    if not _has_extension(name):
        return False
    if name.startswith(_PLACES) or (first in "'\"" and "/" in name):
        return True  # also if it is mistyped, which reading it will say
    return os.path.isfile(name) or os.path.isfile(_without_fragment(name))


def _has_extension(name: str) -> bool:
    return any(os.path.splitext(each)[1][1:].lower() in EXTENSIONS for each in (name, _without_fragment(name)))


def _without_fragment(name: str) -> str:
    """The file of which a name means a part, such as `film.mp4#t=2`."""
    base, _, text = name.rpartition("#")
    return base if base and Fragment.of(text) else name


def _readings(line: str, start: int) -> Iterator[tuple[int, str]]:
    """What the word at a place can be read as: where it ends, and the name. The more likely reading comes first."""
    for end, word in (_shell_word(line, start), _plain_word(line, start)):
        if end > start:
            name = word
            if word[:5].lower() == _FILE:
                try:
                    name = file_path(word)
                except (ImageError, ValueError):
                    continue
            yield end, name
    if line.startswith(_PLACES, start):  # a name with plain blanks, the longest that exists
        most = min(len(line), start + _LONGEST_PATH)
        ends = [match.start() for match in _BLANK.finditer(line, start, most)] + [most]
        for end in reversed(ends):
            name = line[start:end]
            if _has_extension(name) and os.path.isfile(os.path.expanduser(name)):
                yield end, name


def _plain_word(line: str, start: int) -> tuple[int, str]:
    blank = _BLANK.search(line, start)
    end = blank.start() if blank else len(line)
    return end, line[start:end]


def _shell_word(line: str, start: int) -> tuple[int, str]:
    """The word at a place as a shell reads it; empty if a quote is not closed."""
    name: list[str] = []
    place = start
    while place < len(line) and not line[place].isspace():
        char = line[place]
        if char in "'\"":
            end = line.find(char, place + 1)
            if end < 0:
                return start, ""
            name.append(line[place + 1 : end])
            place = end + 1
        elif char == "\\" and place + 1 < len(line):
            name.append(line[place + 1])
            place += 2
        else:
            name.append(char)
            place += 1
    return place, "".join(name)


def words(line: str) -> list[str]:
    """The words of a line as a shell reads them; a quote that is not closed is a character like others."""
    found: list[str] = []
    place = 0
    while place < len(line):
        if line[place].isspace():
            place += 1
            continue
        end, word = _shell_word(line, place)
        if end == place:
            end, word = _plain_word(line, place)
        found.append(word)
        place = end
    return found
