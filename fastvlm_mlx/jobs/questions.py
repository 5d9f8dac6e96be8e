"""Question files: JSON Lines such as `{"image": "photos/1.jpg", "question": "…", "answers": ["…"], "kind": "count"}`.

Image paths are relative to the file's folder, `answers` holds all right texts, and `kind`, which is optional, groups
the results.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fastvlm_mlx.errors import ConfigError

OTHER = "other"
"""Kind of a question without one."""
MALFORMED = "malformed"
"""Kind of a row that is not a question."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, from one row of a question file."""

    line: int
    image: Path
    question: str
    answers: tuple[str, ...]
    kind: str = OTHER

    @property
    def key(self) -> str:
        """Identifies the question in a journal; changes when the image file is overwritten."""
        stat = self.image.stat() if self.image.is_file() else None
        version = (stat.st_size, stat.st_mtime_ns) if stat else None
        return hashlib.sha256(repr((str(self.image), version, self.question)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is not a question, and the reason."""

    line: int
    reason: str


def read_questions(path: Path) -> list[Question | BadRow]:
    """Reads the rows of a question file in order, malformed ones as `BadRow`.

    Raises:
        ConfigError: If the file cannot be read or holds no rows.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read as a question file: {err}") from err
    rows = [_parse(path.parent, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path}: the question file is empty; expected one JSON object per line")
    return rows


def _parse(folder: Path, line: int, text: str) -> Question | BadRow:
    try:
        row = json.loads(text)
    except ValueError as err:
        return BadRow(line=line, reason=f"not valid JSON: {err}")
    if not isinstance(row, dict):
        return BadRow(line=line, reason=f"expected a JSON object, found {type(row).__name__}")
    for name in ("image", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return BadRow(line=line, reason=f'"{name}" must be a text that is not empty, found {row.get(name)!r}')
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return BadRow(line=line, reason=f'"answers" must be a list of texts, at least one, found {answers!r}')
    kind = row.get("kind", OTHER)
    if not isinstance(kind, str):
        return BadRow(line=line, reason=f'"kind" must be a text, found {kind!r}')
    return Question(line=line, image=folder / row["image"], question=row["question"], answers=tuple(answers), kind=kind)


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
