"""The index of an album: one SQLite file with what is known of each picture.

What a picture shows, its caption and its visual tokens, belongs to its content: a copy, a moved file, and a disk that
comes back need nothing anew. The pictures only say where which content is.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.album.database import Database, naming
from fastvlm_mlx.album.words import Expression, plain

_REMEMBERED = 30 * 86400.0
"""Seconds after which what a picture that is gone has shown is forgotten."""
_MOST_AT_ONCE = 500
"""The most values in one statement; SQLite takes 999 or more."""


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


class Index(Database):
    """What is known of the pictures of an album, and where it is kept; see `Database` for how one is opened."""

    def pictures(self) -> list[Known]:
        """All pictures, those that are gone included."""
        rows = self.all("SELECT id, path, stat, modified, content, error, gone FROM pictures ORDER BY id")
        with naming(self.path):
            return [
                Known(number, os.fsdecode(path), tuple(map(int, stat.split())), float(modified), content, error, gone)
                for number, path, stat, modified, content, error, gone in rows
            ]

    def content(self, sha256: str) -> int | None:
        """The number of a content; None if it is new."""
        row = self.one("SELECT id FROM contents WHERE sha256 = ?", sha256)
        return None if row is None else int(row[0])

    def described(self, form: str, fields: Sequence[str], sources: Sequence[str]) -> set[int]:
        """The contents that have visual tokens of a form, and for each field a text from one of some sources."""
        rows = self.all("SELECT content FROM tokens WHERE form = ?", form)
        contents = {row[0] for row in rows}
        for field in fields:
            marks = ", ".join("?" * len(sources))
            statement = f"SELECT content FROM captions WHERE field = ? AND source IN ({marks})"
            contents &= {row[0] for row in self.all(statement, field, *sources)}
        return contents

    def texts(self, content: int) -> dict[str, str]:
        """What was said about a content, by field."""
        return dict(self.all("SELECT field, text FROM captions WHERE content = ?", content))

    def forms(self) -> dict[str, int]:
        """How many contents have visual tokens of each form."""
        return dict(self.all("SELECT form, count(*) FROM tokens GROUP BY form"))

    def candidates(self, form: str, since: str | None = None) -> list[tuple[int, int | None]]:
        """The pictures that are there and can be shown, each with its content if that has tokens of a form.

        Args:
            form: Of the visual tokens.
            since: Only pictures that were taken on this day or later; without a date, the file's counts.
        """
        rows = self.all(
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
            rows = self.all(
                "SELECT p.id, p.path, p.modified, c.taken, c.width, c.height, c.id FROM pictures p "
                f"JOIN contents c ON c.id = p.content WHERE p.id IN ({marks})",
                *part,
            )
            texts: dict[int, list[str]] = {}
            for number, text in self.all(
                "SELECT p.id, a.text FROM pictures p JOIN captions a ON a.content = p.content "
                f"WHERE p.id IN ({marks}) ORDER BY a.field != 'text', a.field",
                *part,
            ):
                texts.setdefault(number, []).append(text)
            with naming(self.path):
                for number, path, modified, taken, width, height, _ in rows:
                    size = (int(width), int(height)) if width and height else None
                    caption = " · ".join(texts.get(number, ()))
                    found[number] = Details(os.fsdecode(path), caption, str(taken), float(modified), size)
        return found

    def matching(self, expression: Expression) -> list[tuple[int, float]]:
        """The pictures whose texts or paths match, with BM25's score, the smallest first."""
        return [
            (int(row[0]), float(row[1]))
            for row in self.all(
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
            for number, kind, count, crc, data in self.all(
                f"SELECT content, type, count, crc, data FROM tokens WHERE form = ? AND content IN ({marks})",
                form,
                *part,
            ):
                if _is_whole(kind, count, crc, data):
                    found[int(number)] = np.frombuffer(data, np.dtype(kind)).reshape(count, -1)
                else:
                    damaged.append(number)
        for number in damaged:
            self.all("DELETE FROM tokens WHERE content = ?", number)
        return found

    def add_content(self, sha256: str, size: tuple[int, int] | None, taken: str) -> int:
        """Makes room for a content; returns its number."""
        width, height = size or (None, None)
        self.all(
            "INSERT OR IGNORE INTO contents (sha256, width, height, taken) VALUES (?, ?, ?, ?)",
            *(sha256, width, height, taken),
        )
        return int(self.one("SELECT id FROM contents WHERE sha256 = ?", sha256)[0])

    def keep_tokens(self, content: int, form: str, visual_tokens: NDArray[np.floating[Any]]) -> None:
        """Keeps visual tokens (N, D), in place of those of another form: as float16, or float32 if one is too large."""
        with np.errstate(over="ignore"):
            halves = visual_tokens.astype(np.float16)
        kept = halves if np.isfinite(halves).all() else visual_tokens.astype(np.float32)
        data = kept.tobytes()
        self.all(
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
            self.all("INSERT OR REPLACE INTO captions VALUES (?, ?, ?, ?)", content, field, text, source)
        for number, path in self.all("SELECT id, path FROM pictures WHERE content = ?", content):
            self._write_words(number, os.fsdecode(path), content)

    def keep_picture(
        self, path: str, stat: Sequence[int], modified: float, content: int | None, error: str | None = None
    ) -> None:
        """Keeps where a content is, or why a file is no picture."""
        self.all(
            "INSERT INTO pictures (path, stat, modified, content, error) VALUES (?, ?, ?, ?, ?) ON CONFLICT (path) DO "
            "UPDATE SET stat = excluded.stat, modified = excluded.modified, content = excluded.content, "
            "error = excluded.error, gone = NULL",
            *(os.fsencode(path), " ".join(map(str, stat)), modified, content, error),
        )
        (number,) = self.one("SELECT id FROM pictures WHERE path = ?", os.fsencode(path))
        self._write_words(number, path, content)

    def _write_words(self, number: int, path: str, content: int | None) -> None:
        rows = self.all("SELECT text FROM captions WHERE content = ? ORDER BY field != 'text', field", content)
        self.all("DELETE FROM words WHERE rowid = ?", number)
        if content is not None:
            shown = path.encode(errors="replace").decode()
            self.all(
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
                    self.all(f"UPDATE pictures SET gone = ? WHERE id IN ({marks})", moment, *part)
            old = [row[0] for row in self.all("SELECT id FROM pictures WHERE gone < ?", now - _REMEMBERED)]
            for part in _parts(old):
                marks = ", ".join("?" * len(part))
                self.all(f"DELETE FROM words WHERE rowid IN ({marks})", *part)
                self.all(f"DELETE FROM pictures WHERE id IN ({marks})", *part)
            for table, column in (("captions", "content"), ("tokens", "content"), ("contents", "id")):
                self.all(
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
