"""A journal of long work on disk, with which an interrupted job continues where it stopped."""

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.outputs import json_line

FINGERPRINT = "fingerprint"
"""The key of every record that says which piece of work it is the outcome of."""

_BEGINNING = f'{{"{FINGERPRINT}": "'.encode()
_MAX_LINE = 16 << 20
"""Bytes of the longest line that can be a record."""
_ADVICE = "; wait until it has ended, or name another"
_MAX_FOREIGN = 1000
"""Lines without a record at the beginning of a file after which it is taken for something else."""


class Journal:
    """Records in a file of JSON Lines, to which each is added as soon as it is known.

    A record is a JSON object with a `fingerprint`. Where several have the same one, the last counts. What a killed
    process or a full disk leaves behind is at most an incomplete last line. It is removed when the file is opened
    again. Memory holds only the places of the records.

    One journal at a time can be open on a file, where the file system has locks.

    Args:
        path: The file; made if it does not exist.
        own: Whether the file is the program's own, as in a cache; what is no record is then removed from it. In a
            user's file it stays, and a file that holds nothing else is refused.
        read_only: Whether to change nothing, and to look at a file that another run has open, too.
        notify: Called with a one-line message about lines that are no records.

    Raises:
        ConfigError: If another run has the file open, or it is something else than a journal.
        OSError: If it cannot be opened or written.
    """

    def __init__(
        self, path: Path, *, own: bool = False, read_only: bool = False, notify: Callable[[str], None] | None = None
    ) -> None:
        self.path = path
        self._read_only = read_only
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO = path.open("rb" if read_only else "a+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise ConfigError(f"{printable(path)}: is not a regular file, in which earlier records could be found")
            self._locked = not read_only and _lock(
                self._file, path, "" if own else "; wait until it has ended, or name another"
            )
            message = self._heal(own)
        except BaseException:
            self._file.close()
            raise
        if message and notify:
            notify(f"{printable(path)}: {message}")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of fingerprints."""
        return len(self._places)

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self._places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the record that counts of each fingerprint, in the order in which these records were added."""
        for place in sorted(self._places.values()):
            yield self._read(*place)

    def get(self, fingerprint: str) -> dict[str, Any] | None:
        """The record with a fingerprint; None if there is none."""
        place = self._places.get(fingerprint)
        return self._read(*place) if place else None

    def add(self, fingerprint: str, record: Mapping[str, Any]) -> None:
        """Adds a record, which from then on outlives the process.

        Raises:
            ConfigError: If the file was removed or replaced meanwhile.
            OSError: If it cannot be written, and then no part of the record is.
        """
        line = json_line({FINGERPRINT: fingerprint, **record})
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise ConfigError(f"{printable(self.path)}: was removed or replaced while records were added to it")
        self._places[fingerprint] = (self._append(line), len(line))

    def close(self) -> None:
        """Writes everything through to the disk, and lets others open the file."""
        if not self._file.closed:
            with self._file:
                os.fsync(self._file.fileno())

    def _append(self, data: bytes) -> int:
        """Writes all of `data` at the end, or nothing; returns where it begins."""
        file = self._file.fileno()
        end = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except BaseException as err:
            if self._locked:  # otherwise what follows may be another process's
                with contextlib.suppress(OSError):
                    os.ftruncate(file, end)
            if isinstance(err, OSError):
                raise OSError(err.errno or errno.EIO, err.strerror, str(self.path)) from err
            raise
        return end

    def _read(self, start: int, size: int) -> dict[str, Any]:
        record = _parse(os.pread(self._file.fileno(), size, start))
        if record is None:
            raise ConfigError(f"{printable(self.path)}: was changed by another program while it was in use")
        return record

    def _heal(self, own: bool) -> str:
        """Finds the records and repairs the file; returns a message about what was wrong with it, or an empty one."""
        damaged: list[_Line] = []
        last = _Line(0, 0, 0, b"\n")
        with self.path.open("rb") as file:
            for last in _lines(file):
                record = _parse(last.text)
                if record is not None:
                    self._places[record[FINGERPRINT]] = (last.start, last.size)
                elif last.text.strip():
                    damaged.append(last if not damaged else last._replace(text=b""))
                    if len(damaged) > _MAX_FOREIGN and not (own or self._places):
                        break
        incomplete = not last.text.endswith(b"\n")
        torn = incomplete and bool(damaged) and damaged[-1].start == last.start and (own or _is_torn(last.text))
        intact = damaged[:-1] if torn else damaged
        if intact and not (own or self._places):
            raise ConfigError(
                f"{printable(self.path)}: holds no records of earlier runs but something else ({intact[0].shown()}); "
                "name another file"
            )
        if self._read_only:
            return ""
        if own and not self._places:
            os.ftruncate(self._file.fileno(), 0)
        else:
            if own:
                self._blank(intact)
            if torn:
                os.ftruncate(self._file.fileno(), last.start)
            elif incomplete:
                self._append(b"\n")
        if not damaged:
            return ""
        lines = "1 damaged line" if len(damaged) == 1 else f"{len(damaged)} damaged lines"
        return f"{lines} {'left out' if intact and not own else 'removed'} ({damaged[0].shown()})"

    def _blank(self, lines: "list[_Line]") -> None:
        """Overwrites lines with spaces, so that all others stay where they are."""
        with self.path.open("r+b") as file:
            for line in lines:
                file.seek(line.start)
                file.write(b" " * (line.size - 1) + b"\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other runs from adding to a journal.

    Raises:
        ConfigError: If one does.
        OSError: If the file cannot be opened.
    """
    with path.open("rb") as file:
        _lock(file, path, _ADVICE)
        yield


def _lock(file: BinaryIO, path: Path, advice: str) -> bool:
    """Keeps others out of a file; False where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise ConfigError(f"{printable(path)}: another run is writing this file{advice}") from err
    except OSError:
        return False
    return True


class Place(NamedTuple):
    """Where a record is in a journal: its line from 1, and its first byte and length."""

    line: int
    start: int
    size: int


def read_records(
    path: Path, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[Place, dict[str, Any] | None]]:
    """Yields the records of a journal one by one, those that count no more included; None for a line without one.

    Nothing is locked, changed or kept in memory. The incomplete last line of a run that goes on is left out.

    Args:
        path: The journal.
        progress: Called now and then with the bytes that have been read.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        for line in _lines(file):
            if not line.text.strip():
                continue
            record = _parse(line.text)
            if record is not None or line.text.endswith(b"\n") or not _is_torn(line.text):
                yield Place(line.number, line.start, line.size), record
            if progress is not None and line.number % 1000 == 0:
                progress(line.start)


class _Line(NamedTuple):
    """A line of a file: its number from 1, its place in bytes, and its text."""

    number: int
    start: int
    size: int
    text: bytes

    def shown(self) -> str:
        return f"line {self.number}: {printable(self.text[:200].decode(errors='replace').strip(), 60)}"


def _lines(file: BinaryIO) -> Iterator[_Line]:
    """Yields the lines of a file; of one that is too long for a record, only its end has a text."""
    number, start = 1, 0
    while text := file.readline(_MAX_LINE):
        size = len(text)
        while len(text) >= _MAX_LINE and not text.endswith(b"\n") and (more := file.readline(_MAX_LINE)):
            text, size = b"\0" + more, size + len(more)
        yield _Line(number, start, size, text)
        number, start = number + 1, start + size


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it holds none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get(FINGERPRINT), str) else None


def _is_torn(line: bytes) -> bool:
    """Whether an incomplete line without a record is what is left of one."""
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
