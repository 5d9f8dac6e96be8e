"""Question files: JSON Lines such as `{"image": "photos/1.jpg", "question": "…", "answers": ["…"], "kind": "count"}`.

An image is a path, relative to the file's folder, or an http(s) or `data:` URL; `answers` holds all right texts; and
`kind`, which is optional, groups the results.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from fastvlm_mlx.arguments import StrPath, file_path
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

OTHER = "other"
"""Kind of a question without one."""
MALFORMED = "malformed"
"""Kind of a row that is not a question."""

_MAX_LINE = 64 << 20
"""Bytes of the longest row; an image may be in it."""
_EXAMPLE = '{"image": "1.jpg", "question": "…", "answers": ["…"]}'


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, from one row of a question file.

    Attributes:
        line: In the file, from 1.
        image: A file, or the text of a URL.
        question: The question.
        answers: All right answers.
        kind: Groups the results.
    """

    line: int
    image: Path | str
    question: str
    answers: tuple[str, ...]
    kind: str = OTHER


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is not a question, and the reason."""

    line: int
    reason: str


def read_questions(path: StrPath) -> list[Question | BadRow]:
    """Reads the rows of a question file in order, malformed ones as `BadRow`.

    Raises:
        ConfigError: If `path` is no path, or the file cannot be read or holds no question.
    """
    path = file_path(path, "path")
    try:
        with path.open("rb") as file:
            rows = [_parse(path.parent, number, line) for number, line in _lines(file) if line.strip()]
    except (OSError, ValueError) as err:  # a name with NUL or half a character
        reason = getattr(err, "strerror", None) or err
        raise ConfigError(f"{printable(path)}: cannot be read as a question file: {reason}") from err
    if not rows:
        raise ConfigError(f"{printable(path)}: the question file is empty; expected one JSON object per line")
    bad = [row for row in rows if isinstance(row, BadRow)]
    if len(bad) == len(rows):
        raise ConfigError(
            f"{printable(path)}: holds no question; line {bad[0].line}: {bad[0].reason}; expected rows like {_EXAMPLE}"
        )
    return rows


def check_images(path: Path, rows: Sequence[Question | BadRow]) -> None:
    """Raises if no image of a question file exists, as when the file was moved without its images.

    Raises:
        ConfigError: If so.
    """
    images = [row.image for row in rows if isinstance(row, Question)]
    if not any(isinstance(image, str) or os.path.exists(os.path.expanduser(image)) for image in images):
        raise ConfigError(
            f"{printable(path)}: none of its images exists, such as {printable(images[0])}; their paths are relative "
            "to the file's folder"
        )


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of each line. Only a line feed ends one; a text may hold what else separates lines."""
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        yield number, line
        while len(line) == _MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(_MAX_LINE)


def _parse(folder: Path, line: int, data: bytes) -> Question | BadRow:
    if len(data) == _MAX_LINE:
        return BadRow(line=line, reason=f"longer than {_MAX_LINE >> 20} MiB")
    try:
        return _question(folder, line, json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8")))
    except UnicodeDecodeError as err:
        reason = f"not UTF-8 ({err.reason} at byte {err.start})"
    except json.JSONDecodeError as err:
        reason = f"not valid JSON: {err}"
    except RecursionError:
        reason = "its JSON is nested too deeply"
    except (ConfigError, ValueError) as err:  # ValueError: a number has too many digits
        reason = printable(err)
    return BadRow(line=line, reason=reason)


def _question(folder: Path, line: int, row: Any) -> Question:
    """The question in a parsed row.

    Raises:
        ConfigError: If there is none.
    """
    if not isinstance(row, dict):
        raise ConfigError(f"expected a JSON object, found {type(row).__name__}")
    for name in ("image", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ConfigError(f'"{name}" must be a text that is not empty, found {row.get(name)!r}')
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ConfigError(f'"answers" must be a list of texts, at least one, found {answers!r}')
    kind = row.get("kind", OTHER)
    if not isinstance(kind, str):
        raise ConfigError(f'"kind" must be a text, found {kind!r}')
    for name, texts in (("question", [row["question"]]), ("answers", answers), ("kind", [kind])):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as err:
                raise ConfigError(f'"{name}" holds half of a surrogate pair, which is no character: {text!r}') from err
    image = _image(folder, row["image"])
    return Question(line=line, image=image, question=row["question"], answers=tuple(answers), kind=kind)


def _image(folder: Path, name: str) -> Path | str:
    """What an image is called outside the folder of the question file."""
    if "://" in name or name[:5].lower() == "data:":
        return name
    beside = folder / name
    return Path(name) if name.startswith("~") and not os.path.lexists(beside) else beside


def _kind(row: Question | BadRow) -> str:
    return MALFORMED if isinstance(row, BadRow) else row.kind


def sample(rows: Sequence[Question | BadRow], limit: int) -> list[Question | BadRow]:
    """Returns a random sample of `limit` rows with each kind in proportion, in the file's order.

    The sample is the same every time, and part of every larger sample. Files are often sorted by kind or cycle through
    the kinds, so rows at equal distances would not have the kinds in proportion.
    """
    sizes, seen = Counter(map(_kind, rows)), Counter[str]()
    random = Random(0)
    shuffled = sorted(range(len(rows)), key=lambda _: random.random())
    positions = {}
    for i in shuffled:  # the n rows of a kind get the positions (1/2)/n, (3/2)/n, … between 0 and 1
        kind = _kind(rows[i])
        positions[i] = (seen[kind] + 0.5) / sizes[kind]
        seen[kind] += 1
    return [rows[i] for i in sorted(sorted(shuffled, key=positions.__getitem__)[:limit])]
