"""Sorts the places of records by the names of pictures: as many as there are, in little memory."""

import heapq
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

_DIGITS = re.compile(r"([0-9]+)")
_HEAD = struct.Struct(">HIQI?")
_IN_MEMORY = 100_000
"""Entries that are sorted at once: about 30 MB."""
_RUNS = 48
"""Sorted files that become one; each is open until then."""
_BUFFER = 1 << 16
_LONGEST = 60_000
"""Bytes of a key."""


class Entry(NamedTuple):
    """Where a record is.

    Attributes:
        key: From `sort_key`; entries are sorted by it, and then by journal and place.
        journal: The journal's number.
        start: Its first byte.
        size: Its bytes.
        failed: Whether it is an error.
    """

    key: bytes
    journal: int
    start: int
    size: int
    failed: bool


def sort_key(name: str, kind: str = "") -> bytes:
    """Bytes that sort the names of pictures as `find_pictures` does: folder by folder, 2 before 10, a before B.

    Args:
        name: The name; it is in the key.
        kind: Keeps records of other kinds about the same picture apart.
    """
    parts = b"\0".join(_natural(part) for part in name.split("/"))
    return (parts[:_LONGEST] + b"\0\0" + _bytes(name)[:4096] + b"\0" + kind.encode())[: _LONGEST + 5000]


def name_in(key: bytes) -> str:
    """The name that a key was made of."""
    _, _, rest = key.partition(b"\0\0")
    return rest.partition(b"\0")[0].decode("utf-8", "surrogatepass")


def _bytes(text: str) -> bytes:
    return text.replace("\0", " ").encode("utf-8", "surrogatepass")


def _natural(part: str) -> bytes:
    pieces = _DIGITS.split(part.casefold())
    numbers = [piece.lstrip("0") for piece in pieces[1::2]]
    coded = [_bytes(piece) for piece in pieces]
    coded[1::2] = [struct.pack(">H", len(number)) + number.encode() for number in numbers]
    return b"\1".join(coded) or b"\1"


class Sorter:
    """Takes entries in any order, and gives them back sorted.

    Args:
        folder: For a temporary file that has no name, so that nothing is left of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[Entry] = []
        self._levels: list[list[BinaryIO]] = []

    def __enter__(self) -> "Sorter":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.close()

    @property
    def _runs(self) -> list[BinaryIO]:
        return [run for level in self._levels for run in level]

    def add(self, entry: Entry) -> None:
        """Adds an entry."""
        self._entries.append(entry)
        if len(self._entries) >= _IN_MEMORY:
            self._entries.sort()
            self._spill(self._entries, 0)
            self._entries = []

    def entries(self) -> Iterator[Entry]:
        """The entries, sorted."""
        self._entries.sort()
        return heapq.merge(*map(_read, self._runs), self._entries)

    def _spill(self, entries: Iterable[Entry], level: int) -> None:
        """Writes sorted entries to a file of a level; many files of one level become one of the next."""
        if len(self._levels) == level:
            self._levels.append([])
        run = cast(BinaryIO, tempfile.TemporaryFile(dir=self._folder, buffering=_BUFFER))  # noqa: SIM115
        runs = self._levels[level]
        runs.append(run)
        for entry in entries:
            run.write(_HEAD.pack(len(entry.key), *entry[1:]) + entry.key)
        if len(runs) >= _RUNS:
            self._spill(heapq.merge(*map(_read, runs)), level + 1)
            for each in runs:
                each.close()
            self._levels[level] = []


def _read(run: BinaryIO) -> Iterator[Entry]:
    run.seek(0)
    while head := run.read(_HEAD.size):
        length, journal, start, size, failed = _HEAD.unpack(head)
        yield Entry(run.read(length), journal, start, size, failed)
