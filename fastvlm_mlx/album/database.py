"""The SQLite file of an album's index: opened, checked, locked, and replaced when it is damaged."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.machine import cache_folder

if TYPE_CHECKING:
    from typing_extensions import Self

FOLDER = "albums"
"""Of the cache folder, where the indexes are."""
ENDING = ".sqlite"
_APPLICATION = 0x46564C41
"""What SQLite files of albums bear in their header, so that no other file is taken for one."""
_VERSION = 1
_MAGIC = b"SQLite format 3\0"
_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
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


def index_path(folder: Path) -> Path:
    """Where in the cache the index of a folder is; the folder need not exist."""
    real = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    readable = re.sub(r"[^\w.@-]", "_", os.path.basename(real))[:55] or "album"
    return cache_folder() / FOLDER / f"{readable}-{digest}{ENDING}"


class Database:
    """The file of an index, opened or made. Several threads and processes may use one.

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

    def __enter__(self) -> Self:
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
        with naming(self.path):
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
        with self.changing():
            (version,) = self.one("PRAGMA user_version")
            (application,) = self.one("PRAGMA application_id")
            (tables,) = self.one("SELECT count(*) FROM sqlite_master")
            if (version, application, tables) == (0, 0, 0):
                for statement in _SCHEMA.split(";\n"):
                    self.all(statement)
                self.all(f"PRAGMA application_id = {_APPLICATION}")
                self.all(f"PRAGMA user_version = {_VERSION}")
            elif (version, application) != (_VERSION, _APPLICATION):
                raise DamagedIndexError(f"{printable(self.path)}: is an index of another version")
            for table in ("facts", "contents", "pictures", "captions", "tokens", "words"):
                self.all(f"SELECT 1 FROM {table} LIMIT 1")

    def _replace(self) -> None:
        """Makes the index anew in the place of a damaged one; a user's file is kept under another name."""
        self._connection.close()
        with naming(self.path):
            if not self._own and self.path.exists():
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
        with naming(self.path), self.path.with_name(f".{self.path.name}.updating").open("ab") as file:
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
            self.all("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self.all("COMMIT")

    def all(self, statement: str, *values: Any) -> list[Any]:
        """The rows of a statement of SQL.

        Raises:
            DamagedIndexError: If the file is damaged.
            ConfigError: If it cannot be used.
        """
        with self._lock, naming(self.path):
            return self._connection.execute(statement, values).fetchall()

    def one(self, statement: str, *values: Any) -> Any:
        """The first row of a statement of SQL; None if there is none."""
        rows = self.all(statement, *values)
        return rows[0] if rows else None

    def fact(self, name: str) -> str | None:
        """What was noted under a name."""
        row = self.one("SELECT value FROM facts WHERE name = ?", name)
        return None if row is None else str(row[0])

    def note(self, name: str, value: str) -> None:
        """Notes something about the whole album."""
        self.all("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)


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
def naming(path: Path) -> Iterator[None]:
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
