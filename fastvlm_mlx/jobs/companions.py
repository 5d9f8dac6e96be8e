"""Files that belong to a picture beside them: the film of a Live Photo, and what is said about it."""

from typing import NamedTuple

from fastvlm_mlx.jobs.kinds import PICTURES

_COMPANIONS = frozenset(("txt", "xmp", "aae", "thm", "json"))
"""Extensions of what is said about a picture beside it; such files are left out without a word."""
LIVE_PHOTO = ("heic", "jpg", "jpeg")
LIVE_FILM = ("mov", "mp4")
"""Extensions of the two halves of a Live Photo."""


class Entry(NamedTuple):
    """What a folder holds under a name; `live` is the picture that a film belongs to."""

    name: str
    path: str
    is_folder: bool
    is_file: bool
    live: str = ""


def split_extension(name: str) -> tuple[str, str]:
    """The name without its extension and the extension, both without case."""
    stem, dot, extension = name.casefold().rpartition(".")
    return (stem, extension) if dot else (extension, "")


def with_films(entries: list[Entry]) -> list[Entry]:
    """Marks the film of each Live Photo, which has the picture's name, in a Photos library with `_3` after it."""
    parts = [split_extension(entry.name) for entry in entries]
    if not any(extension in LIVE_FILM for _, extension in parts):
        return entries
    named = list(zip(entries, parts, strict=True))
    pictures = {stem: entry.name for entry, (stem, extension) in named if extension in LIVE_PHOTO}
    return [
        entry._replace(live=pictures.get(stem) or pictures.get(stem.removesuffix("_3"), ""))
        if extension in LIVE_FILM
        else entry
        for entry, (stem, extension) in named
    ]


def without_companions(entries: list[Entry]) -> list[Entry]:
    """Leaves out what is said about a picture beside it."""
    named = [(entry, *split_extension(entry.name)) for entry in entries]
    pictures = {
        name for entry, stem, extension in named if extension in PICTURES for name in (stem, entry.name.casefold())
    }
    return [
        entry
        for entry, stem, extension in named
        if entry.name != "metadata.jsonl" and not (extension in _COMPANIONS and stem in pictures)
    ]
