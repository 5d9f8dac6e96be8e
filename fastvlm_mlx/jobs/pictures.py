"""Finds the pictures that files, folders, patterns and lists name, for work on many of them."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.fragments import Fragment, Part, split_name
from fastvlm_mlx.inputs.named import ANIMATION, FILM, PDF, is_live, kind_of_file, meant
from fastvlm_mlx.jobs.companions import LIVE_FILM, LIVE_PHOTO, Entry, split_extension, with_films, without_companions
from fastvlm_mlx.jobs.kinds import LIBRARY, PICTURES, RAW, in_library, is_picture
from fastvlm_mlx.jobs.patterns import Matcher, any_of, expand, is_pattern, split_recursive

_ORIGINALS = ("originals", "Masters")
_GENERATED = frozenset(("@eaDir", "__MACOSX"))
"""Folders of thumbnails and metadata that servers and archives put among pictures."""
_MOVING = frozenset(("gif", "webp", "png", "apng"))
_NOT_TAKEN = {FILM: "a film, without --frames or --every", PDF: "a PDF, without --pages"}
LIVE = "live"
"""The kind of a picture that a device shows when it is looked at."""
_DIGITS = re.compile(r"([0-9]+)")


class Picture(NamedTuple):
    """A picture to work on.

    Attributes:
        path: Its name on this machine, or an http(s) URL; bytes that are not UTF-8 are half surrogates.
        root: The folder that was named and holds it; of a picture that was named itself, its own folder.
        read_only: Whether nothing may be written beside it, as in the library of Apple's Photos and on the web.
        kind: What its file holds if that is several pictures, see `inputs.named.kind_of`; `LIVE` for a device.
        fragment: Which of them were named; None if that was not said.
        part: Which of them it is; None until that is looked at.
    """

    path: str
    root: str
    read_only: bool = False
    kind: str = ""
    fragment: Fragment | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        """Its path below `root`; that of a part says which one it is."""
        whole = self.kind == LIVE or self.path.startswith(_URLS)
        return (self.path if whole else os.path.relpath(self.path, self.root)) + self._suffix

    @property
    def place(self) -> str:
        """Its path; that of a part says which one it is."""
        return self.path + self._suffix

    @property
    def _suffix(self) -> str:
        return self.part.fragment if self.part else ""


class Skipped(NamedTuple):
    """Something that is no picture, or could not be looked at, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Pictures:
    """What was found.

    Attributes:
        found: The pictures, in the order of their names, and each once.
        skipped: Files that are no pictures.
        unreadable: What was named but does not exist, and folders and files that may not be read.
    """

    found: list[Picture] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unreadable: list[Skipped] = field(default_factory=list)


_URLS = ("http://", "https://")


def find_pictures(
    names: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Collection[str] = (),
) -> Pictures:
    """Finds the pictures that `names` stand for; reads at most the first bytes of a file.

    Folders are searched with all that is in them, in natural order (2 before 10). Hidden files and folders in them
    are left out, and so is all of a Photos library but its originals. Links are followed, but each folder is searched
    once. The film of a Live Photo belongs to its picture.

    Args:
        names: Files, folders, patterns such as `2024/**/*.jpg`, and http(s) URLs. A file whose name looks like a
            pattern is that file.
        include: Patterns such as `*.jpg`; only files count whose name, or path below the folder, matches one.
        exclude: Patterns; files and folders that match one are left out.
        kinds: Of files with several pictures (`FILM`, `PDF`, `ANIMATION`) that are taken from folders, too. Films and
            PDFs that are named themselves always are. Which pictures they hold, `jobs.parts` finds out.
    """
    search = _Search(include, exclude, kinds)
    for name in names:
        search.add(name)
    return search.pictures


def read_names(data: bytes, name: str) -> list[str]:
    """Returns the names in a list of files: one on each line or, as from `find -print0`, ended by zero bytes.

    Args:
        data: The list, in the encoding of the file system.
        name: Of the list, for messages.

    Raises:
        ConfigError: If there are none.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    names = [os.fsdecode(line) for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{printable(name)}: names no files; expected one on each line")
    return names


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names as people do: 2 before 10, a before B."""
    parts: list[str | int] = list(_DIGITS.split(name.casefold()))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


class _Search:
    """Collects pictures, each file once."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], kinds: Collection[str]) -> None:
        self.pictures = Pictures()
        self._kinds = kinds
        self._include = any_of(include) if include else None
        self._exclude = any_of(exclude) if exclude else None
        self._known: set[str] = set()
        self._folders: dict[str, str] = {}

    def add(self, name: str) -> None:
        """Adds what a name on the command line or in a list stands for."""
        if name.lower().startswith(_URLS):
            if name not in self._known:
                self._known.add(name)
                self.pictures.found.append(Picture(name, "", read_only=True))
            return
        if is_live(name):
            self.pictures.found.append(Picture(name, "", read_only=True, kind=LIVE))
            return
        if name.startswith("~") and not os.path.lexists(name):
            name = os.path.expanduser(name)
        try:
            path, fragment = split_name(name)
        except ImageError as err:
            self._cannot_read(name, str(err).removeprefix(f"{printable(name)}: "))
            return
        if os.path.lexists(path):
            self._add_path(path, fragment)
        elif not is_pattern(name):
            near = meant(name)
            self._cannot_read(name, f"no such source; did you mean {printable(near)}?" if near else "no such file")
        elif not self._add_matches(name):
            self._cannot_read(name, "no file matches this pattern")

    def _add_matches(self, pattern: str) -> bool:
        """Adds what matches a pattern; returns whether anything does."""
        recursive = split_recursive(pattern)
        if recursive is None:
            matches = sorted(expand(pattern), key=natural_key)
            for match in matches:
                self._add_path(match)
            return bool(matches)
        base, matches_below = recursive
        roots = sorted(expand(base), key=natural_key) if is_pattern(base) else [base]
        return any([self._walk(root, matches_below) for root in roots if os.path.isdir(root)])

    def _add_path(self, path: str, fragment: Fragment | None = None) -> None:
        if os.path.isdir(path):
            self._walk(path)
            return
        folder, name = os.path.split(path)
        stem, extension = os.path.splitext(path)
        beside = (f"{stem}.{other}" for other in LIVE_PHOTO for other in (other, other.upper()))
        live = next(filter(os.path.exists, beside), "") if extension[1:].lower() in LIVE_FILM else ""
        kind = "" if live and fragment is None else kind_of_file(path)
        if kind in (FILM, PDF) or (kind and (fragment or kind in self._kinds)):
            self._add_bundle(Picture(path, folder, in_library(path), kind, fragment))
            return
        if fragment is not None:
            self._cannot_read(f"{path}{fragment.text}", "is neither a film nor a PDF, so it has no such part")
            return
        self._look_at(Entry(name, path, False, os.path.isfile(path), os.path.basename(live)), folder)

    def _walk(self, root: str, matches: Matcher | None = None) -> bool:
        """Searches a folder of any depth for what matches; returns whether anything does.

        Each folder is searched once. Those behind links come last, because they may be elsewhere in it.
        """
        links: list[str] = []
        searched: set[tuple[int, int]] = set()
        levels = [iter(self._entries(root, links, searched))]
        found = False
        while levels:
            entry = next(levels[-1], None)
            if entry is None:
                levels.pop()
                if not levels and links:
                    levels.append(iter(self._entries(links.pop(0), links, searched)))
                continue
            below = os.path.relpath(entry.path, root) if matches or self._exclude else ""
            if entry.is_folder:
                if not (self._exclude and self._exclude(below)):
                    levels.append(iter(self._entries(entry.path, links, searched)))
            elif matches is None or matches(below):
                found = True
                self._look_at(entry, root)
        return found

    def _entries(self, folder: str, links: list[str], searched: set[tuple[int, int]]) -> list[Entry]:
        """What is in a folder, in natural order, but folders behind links, which are appended to `links`."""
        entries = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in searched:
                self._skip(folder, "another name of a folder that was searched")
                return []
            searched.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                for entry in scan:
                    if entry.name.startswith(".") or entry.name in _GENERATED:
                        continue
                    is_folder, is_file = _kind(entry)
                    if is_folder and entry.is_symlink():
                        links.append(entry.path)
                    else:
                        entries.append(Entry(entry.name, entry.path, is_folder, is_file))
        except OSError as err:
            self._cannot_read(folder, err.strerror or str(err))
        links.sort(key=natural_key)
        if folder.lower().endswith(LIBRARY):
            entries = [entry for entry in entries if entry.name in _ORIGINALS]
        return sorted(without_companions(with_films(entries)), key=lambda entry: natural_key(entry.name))

    def _look_at(self, entry: Entry, root: str) -> None:
        """Adds a file to the pictures, or to what is skipped."""
        if self._include or self._exclude:
            below = os.path.relpath(entry.path, root or ".")
            if (self._exclude and self._exclude(below)) or (self._include and not self._include(below)):
                return
        folder = os.path.dirname(entry.path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        place = f"{self._folders[folder]}/{entry.name}"
        if place in self._known:
            return
        self._known.add(place)
        extension = split_extension(entry.name)[1]
        if entry.live:
            self._skip(entry.path, f"film of the Live Photo {printable(entry.live, 60)}")
        elif not entry.is_file and not os.path.exists(entry.path):
            self._cannot_read(entry.path, "a link to nothing")
        elif not entry.is_file:
            self._skip(entry.path, "neither a file nor a folder")
        elif extension in RAW:
            self._skip(entry.path, "a camera's raw file; develop it to JPEG first")
        else:
            try:
                known = extension in PICTURES
                is_sought = not known or (ANIMATION in self._kinds and extension in _MOVING)
                kind = kind_of_file(entry.path) if is_sought else ""
                picture = Picture(entry.path, root, read_only=LIBRARY in place.lower())
                if kind and kind in self._kinds:
                    self.pictures.found.append(picture._replace(kind=kind))
                elif known or is_picture(entry.path):
                    self.pictures.found.append(picture)
                else:
                    self._skip(entry.path, _NOT_TAKEN.get(kind, "not a picture"))
            except OSError as err:
                self._cannot_read(entry.path, err.strerror or str(err))

    def _add_bundle(self, picture: Picture) -> None:
        """Adds a film or a PDF that was named itself, each part once."""
        place = f"{os.path.realpath(picture.path)}{picture.fragment.text if picture.fragment else ''}"
        below = os.path.basename(picture.path)
        if (self._exclude and self._exclude(below)) or (self._include and not self._include(below)):
            return
        if place not in self._known:
            self._known.add(place)
            self.pictures.found.append(picture)

    def _skip(self, path: str, reason: str) -> None:
        self.pictures.skipped.append(Skipped(path, reason))

    def _cannot_read(self, path: str, reason: str) -> None:
        self.pictures.unreadable.append(Skipped(path, reason))


def _kind(entry: "os.DirEntry[str]") -> tuple[bool, bool]:
    """Whether an entry is a folder and whether it is a file, behind a link, too; neither if the link leads nowhere."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False
