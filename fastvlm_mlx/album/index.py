"""The index of an album: one SQLite file with what is known of each picture.

What a picture shows, its caption and its visual tokens, belongs to its content: a copy, a moved file, and a disk that
comes back need nothing anew. The pictures only say where which content is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.album.words import Expression, plain
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.machine import cache_folder

FOLDER = "albums"
"""Of the cache folder, where the indexes are."""
ENDING = ".sqlite"
_APPLICATION = 0x46564C41
"""What SQLite files of albums bear in their header, so that no other file is taken for one."""
_VERSION = 1
_MAGIC = b"SQLite format 3\0"
_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
_REMEMBERED = 30 * 86400.0
"""Seconds after which what a picture that is gone has shown is forgotten."""
_MOST_AT_ONCE = 500
"""The most values in one statement; SQLite takes 999 or more."""
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE contents (
    id INTEGER PRIMARY KEY, sha256 TEXT UNIQUE NOT NULL, width INTEGER, height INTEGER, taken TEXT NOT NULL
);
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL, stat TEXT NOT NULL, modified REAL NOT NULL,
    content INTEGER, error TEXT, gone REAL
);
CREATE INDEX pictures_by_content ON pictures (content);
CREATE TABLE captions (
    content INTEGER NOT NULL, field TEXT NOT NULL, text TEXT NOT NULL, source TEXT NOT NULL,
    PRIMARY KEY (content, field)
) WITHOUT ROWID;
CREATE TABLE tokens (
    content INTEGER PRIMARY KEY, form TEXT NOT NULL, type TEXT NOT NULL, count INTEGER NOT NULL, crc INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX tokens_by_form ON tokens (form);
CREATE VIRTUAL TABLE words USING fts5 (text, path, tokenize = 'porter unicode61 remove_diacritics 2');
"""


class DamagedIndexError(ConfigError):
    """An index that SQLite cannot read any more, or that another program has changed."""


class Known(NamedTuple):
    """A picture in the index.

    Attributes:
        id: Its number in the index.
        path: Its path below the album's folder.
        stat: Of the file when it was looked at.
        modified: When the file was changed last, in seconds since 1970.
        content: The number of its content; None if it could not be read.
        error: Why it could not be read.
        gone: When it was found to be gone; None if it was there at the last look.
    """

    id: int
    path: str
    stat: tuple[int, ...]
    modified: float
    content: int | None
    error: str | None
    gone: float | None


class Details(NamedTuple):
    """What the index says about a picture for people.

    Attributes:
        path: Its path below the album's folder.
        caption: What the model or a person has said about it; empty if nothing.
        taken: The day on which it was taken, as `2026-11-26`; empty if unknown.
        modified: When the file was changed last, in seconds since 1970.
        size: Width and height in pixels, as stored; None if unknown.
    """

    path: str
    caption: str
    taken: str
    modified: float
    size: tuple[int, int] | None


def index_path(folder: Path) -> Path:
    """Where in the cache the index of a folder is; the folder need not exist."""
    real = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    readable = re.sub(r"[^\w.@-]", "_", os.path.basename(real))[:55] or "album"
    return cache_folder() / FOLDER / f"{readable}-{digest}{ENDING}"


class Index:
    """An index, opened or made. Several threads and processes may use one.

    Args:
        path: The file.
        folder: The album's, for an index that is made.
        own: Whether the file is the program's own, as in the cache: what is no index there is replaced.

    Attributes:
        rebuilt: Whether there was a damaged one in its place.

    Raises:
        ConfigError: If the file is something else, or cannot be opened.
    """

    def __init__(self, path: Path, folder: str, *, own: bool) -> None:
        self.path = path
        self.rebuilt = False
        self._own = own
        self._lock = threading.RLock()
        if own:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._mark: BinaryIO | None = _marked(path, folder) if own else None
        try:
            self._check_kind()
            try:
                self._open()
            except DamagedIndexError:
                self._replace()
            self._check_folder(folder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            if hasattr(self, "_connection"):
                self._connection.close()
            if self._mark is not None:
                self._mark.close()

    def _check_kind(self) -> None:
        """Refuses a user's file that is something else than an index."""
        if self._own:
            return
        try:
            with self.path.open("rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return
        except OSError as err:
            raise ConfigError(f"{printable(self.path)}: cannot be read as an index ({err.strerror or err})") from err
        if header and (not header.startswith(_MAGIC) or int.from_bytes(header[68:72], "big") != _APPLICATION):
            raise ConfigError(f"{printable(self.path)}: is not the index of an album; name another file")

    def _check_folder(self, folder: str) -> None:
        """Notes which folder the index is of; refuses that of another one, unless that has moved."""
        noted = self.fact("folder")
        before = None if noted is None else os.fsdecode(bytes.fromhex(noted))
        if before not in (None, folder) and os.path.isdir(str(before)):
            raise ConfigError(f"{printable(self.path)}: is the index of {printable(before)}; name another file")
        if before != folder:
            self.note("folder", os.fsencode(folder).hex())

    def _open(self) -> None:
        with _named(self.path):
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        with self.changing():
            (version,) = self._one("PRAGMA user_version")
            (application,) = self._one("PRAGMA application_id")
            (tables,) = self._one("SELECT count(*) FROM sqlite_master")
            if (version, application, tables) == (0, 0, 0):
                for statement in _SCHEMA.split(";\n"):
                    self._all(statement)
                self._all(f"PRAGMA application_id = {_APPLICATION}")
                self._all(f"PRAGMA user_version = {_VERSION}")
            elif (version, application) != (_VERSION, _APPLICATION):
                raise DamagedIndexError(f"{printable(self.path)}: is an index of another version")
            for table in ("facts", "contents", "pictures", "captions", "tokens", "words"):
                self._all(f"SELECT 1 FROM {table} LIMIT 1")

    def _replace(self) -> None:
        """Makes the index anew in the place of a damaged one; a user's file is kept under another name."""
        self._connection.close()
        with _named(self.path):
            if not self._own:
                os.replace(self.path, f"{self.path}.damaged")
            for ending in ("", "-journal"):
                Path(f"{self.path}{ending}").unlink(missing_ok=True)
        self._open()
        self.rebuilt = True

    def rebuild(self) -> None:
        """Makes the index anew after a `DamagedIndexError`."""
        with self._lock:
            self._replace()

    @contextmanager
    def updating(self) -> Iterator[bool]:
        """Yields whether this is the only one that brings the index up to date; it is for as long as this lasts."""
        with _named(self.path), self.path.with_name(f".{self.path.name}.updating").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks
                pass
            yield True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is done within it is kept together, or not at all."""
        with self._lock:
            self._all("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self._all("COMMIT")

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, _named(self.path):
            return self._connection.execute(statement, values).fetchall()

    def _one(self, statement: str, *values: Any) -> Any:
        rows = self._all(statement, *values)
        return rows[0] if rows else None

    # What is known

    def fact(self, name: str) -> str | None:
        """What was noted under a name."""
        row = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row[0])

    def note(self, name: str, value: str) -> None:
        """Notes something about the whole album."""
        self._all("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def pictures(self) -> list[Known]:
        """All pictures, those that are gone included."""
        rows = self._all("SELECT id, path, stat, modified, content, error, gone FROM pictures ORDER BY id")
        with _named(self.path):
            return [
                Known(number, os.fsdecode(path), tuple(map(int, stat.split())), float(modified), content, error, gone)
                for number, path, stat, modified, content, error, gone in rows
            ]

    def content(self, sha256: str) -> int | None:
        """The number of a content; None if it is new."""
        row = self._one("SELECT id FROM contents WHERE sha256 = ?", sha256)
        return None if row is None else int(row[0])

    def described(self, form: str, fields: Sequence[str], sources: Sequence[str]) -> set[int]:
        """The contents that have visual tokens of a form, and for each field a text from one of some sources."""
        rows = self._all("SELECT content FROM tokens WHERE form = ?", form)
        contents = {row[0] for row in rows}
        for field in fields:
            marks = ", ".join("?" * len(sources))
            statement = f"SELECT content FROM captions WHERE field = ? AND source IN ({marks})"
            contents &= {row[0] for row in self._all(statement, field, *sources)}
        return contents

    def texts(self, content: int) -> dict[str, str]:
        """What was said about a content, by field."""
        return dict(self._all("SELECT field, text FROM captions WHERE content = ?", content))

    def forms(self) -> dict[str, int]:
        """How many contents have visual tokens of each form."""
        return dict(self._all("SELECT form, count(*) FROM tokens GROUP BY form"))

    def candidates(self, form: str, since: str | None = None) -> list[tuple[int, int | None]]:
        """The pictures that are there and can be shown, each with its content if that has tokens of a form.

        Args:
            form: Of the visual tokens.
            since: Only pictures that were taken on this day or later; without a date, the file's counts.
        """
        rows = self._all(
            "SELECT p.id, t.content, c.taken, p.modified FROM pictures p JOIN contents c ON c.id = p.content "
            "LEFT JOIN tokens t ON t.content = p.content AND t.form = ? WHERE p.gone IS NULL ORDER BY p.id",
            form,
        )
        if since is not None:
            rows = [row for row in rows if (str(row[2]) or day(row[3])) >= since]
        return [(row[0], row[1]) for row in rows]

    def details(self, numbers: Sequence[int]) -> dict[int, Details]:
        """What the index says about pictures."""
        found: dict[int, Details] = {}
        for part in _parts(numbers):
            marks = ", ".join("?" * len(part))
            rows = self._all(
                "SELECT p.id, p.path, p.modified, c.taken, c.width, c.height, c.id FROM pictures p "
                f"JOIN contents c ON c.id = p.content WHERE p.id IN ({marks})",
                *part,
            )
            texts: dict[int, list[str]] = {}
            for number, text in self._all(
                "SELECT p.id, a.text FROM pictures p JOIN captions a ON a.content = p.content "
                f"WHERE p.id IN ({marks}) ORDER BY a.field != 'text', a.field",
                *part,
            ):
                texts.setdefault(number, []).append(text)
            with _named(self.path):
                for number, path, modified, taken, width, height, _ in rows:
                    size = (int(width), int(height)) if width and height else None
                    caption = " · ".join(texts.get(number, ()))
                    found[number] = Details(os.fsdecode(path), caption, str(taken), float(modified), size)
        return found

    def matching(self, expression: Expression) -> list[tuple[int, float]]:
        """The pictures whose texts or paths match, with BM25's score, the smallest first."""
        return [
            (int(row[0]), float(row[1]))
            for row in self._all(
                "SELECT w.rowid, bm25(words) FROM words w JOIN pictures p ON p.id = w.rowid "
                "WHERE words MATCH ? AND p.gone IS NULL ORDER BY 2",
                expression,
            )
        ]

    def visual_tokens(self, contents: Sequence[int], form: str) -> dict[int, NDArray[Any]]:
        """The visual tokens (N, D) of contents, as they were kept.

        Those that are damaged are left out, and removed, so that they are made again.
        """
        found: dict[int, NDArray[Any]] = {}
        damaged = []
        for part in _parts(contents):
            marks = ", ".join("?" * len(part))
            for number, kind, count, crc, data in self._all(
                f"SELECT content, type, count, crc, data FROM tokens WHERE form = ? AND content IN ({marks})",
                form,
                *part,
            ):
                if _is_whole(kind, count, crc, data):
                    found[int(number)] = np.frombuffer(data, np.dtype(kind)).reshape(count, -1)
                else:
                    damaged.append(number)
        for number in damaged:
            self._all("DELETE FROM tokens WHERE content = ?", number)
        return found

    # Changes

    def add_content(self, sha256: str, size: tuple[int, int] | None, taken: str) -> int:
        """Makes room for a content; returns its number."""
        width, height = size or (None, None)
        self._all(
            "INSERT OR IGNORE INTO contents (sha256, width, height, taken) VALUES (?, ?, ?, ?)",
            *(sha256, width, height, taken),
        )
        return int(self._one("SELECT id FROM contents WHERE sha256 = ?", sha256)[0])

    def keep_tokens(self, content: int, form: str, visual_tokens: NDArray[np.floating[Any]]) -> None:
        """Keeps visual tokens (N, D), in place of those of another form: as float16, or float32 if one is too large."""
        with np.errstate(over="ignore"):
            halves = visual_tokens.astype(np.float16)
        kept = halves if np.isfinite(halves).all() else visual_tokens.astype(np.float32)
        data = kept.tobytes()
        self._all(
            "INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?, ?)",
            *(content, form, kept.dtype.name, len(kept), zlib.crc32(data), data),
        )

    def keep_texts(self, content: int, texts: Mapping[str, str], source: str) -> None:
        """Keeps what was said about a content, and lets its pictures be found by that.

        Args:
            content: The content.
            texts: By field.
            source: Who has said that.
        """
        for field, text in texts.items():
            self._all("INSERT OR REPLACE INTO captions VALUES (?, ?, ?, ?)", content, field, text, source)
        for number, path in self._all("SELECT id, path FROM pictures WHERE content = ?", content):
            self._write_words(number, os.fsdecode(path), content)

    def keep_picture(
        self, path: str, stat: Sequence[int], modified: float, content: int | None, error: str | None = None
    ) -> None:
        """Keeps where a content is, or why a file is no picture."""
        self._all(
            "INSERT INTO pictures (path, stat, modified, content, error) VALUES (?, ?, ?, ?, ?) ON CONFLICT (path) DO "
            "UPDATE SET stat = excluded.stat, modified = excluded.modified, content = excluded.content, "
            "error = excluded.error, gone = NULL",
            *(os.fsencode(path), " ".join(map(str, stat)), modified, content, error),
        )
        (number,) = self._one("SELECT id FROM pictures WHERE path = ?", os.fsencode(path))
        self._write_words(number, path, content)

    def _write_words(self, number: int, path: str, content: int | None) -> None:
        rows = self._all("SELECT text FROM captions WHERE content = ? ORDER BY field != 'text', field", content)
        self._all("DELETE FROM words WHERE rowid = ?", number)
        if content is not None:
            shown = path.encode(errors="replace").decode()
            self._all(
                "INSERT INTO words (rowid, text, path) VALUES (?, ?, ?)",
                *(number, plain("\n".join(row[0] for row in rows)), plain(shown)),
            )

    def set_gone(self, gone: Iterable[int], back: Iterable[int]) -> None:
        """Notes which pictures are gone and which are back, and forgets those that are gone for long."""
        now = time.time()
        with self.changing():
            for numbers, moment in ((gone, now), (back, None)):
                for part in _parts(list(numbers)):
                    marks = ", ".join("?" * len(part))
                    self._all(f"UPDATE pictures SET gone = ? WHERE id IN ({marks})", moment, *part)
            old = [row[0] for row in self._all("SELECT id FROM pictures WHERE gone < ?", now - _REMEMBERED)]
            for part in _parts(old):
                marks = ", ".join("?" * len(part))
                self._all(f"DELETE FROM words WHERE rowid IN ({marks})", *part)
                self._all(f"DELETE FROM pictures WHERE id IN ({marks})", *part)
            for table, column in (("captions", "content"), ("tokens", "content"), ("contents", "id")):
                self._all(
                    f"DELETE FROM {table} WHERE {column} NOT IN "
                    "(SELECT content FROM pictures WHERE content IS NOT NULL)"
                )


def _is_whole(kind: Any, count: Any, crc: Any, data: Any) -> bool:
    """Whether visual tokens are as they were kept."""
    if kind not in ("float16", "float32") or not isinstance(data, bytes) or not isinstance(count, int):
        return False
    return zlib.crc32(data) == crc and count > 0 and len(data) % (count * np.dtype(kind).itemsize) == 0


def day(moment: float) -> str:
    """The day of a time in seconds since 1970, as `2026-11-26`."""
    with suppress(OverflowError, OSError, ValueError):
        return time.strftime("%Y-%m-%d", time.localtime(moment))
    return ""


def _parts(values: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(values), _MOST_AT_ONCE):
        yield values[start : start + _MOST_AT_ONCE]


def _marked(path: Path, folder: str) -> BinaryIO | None:
    """The mark of an index in the cache, see `fastvlm_mlx.cache`, locked; None where nothing can be written."""
    with suppress(OSError):
        file = path.with_name(f".{path.name}.used").open("a+b")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        if file.read() != os.fsencode(folder):
            file.truncate(0)
            file.write(os.fsencode(folder))
            file.flush()
        os.utime(file.fileno())
        return file
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of SQLite and the operating system into one that names the index."""
    try:
        yield
    except sqlite3.OperationalError as err:
        # What a damaged file makes SQLite say is a DatabaseError, but for missing tables and columns.
        if "no such" in str(err) or "no column" in str(err) or "malformed" in str(err):
            raise DamagedIndexError(f"{printable(path)}: is damaged ({err})") from err
        raise ConfigError(f"{printable(path)}: cannot be used as an index ({err})") from err
    except (sqlite3.DatabaseError, ValueError, TypeError) as err:
        raise DamagedIndexError(f"{printable(path)}: is damaged ({err})") from err
    except OSError as err:
        raise ConfigError(f"{printable(path)}: cannot be used as an index ({err.strerror or err})") from err
