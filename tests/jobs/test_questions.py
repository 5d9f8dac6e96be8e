import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.questions import BadRow, Question, read_questions, sample


def write(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes: object) -> dict[str, object]:
    return {"image": "a.png", "question": "What?", "answers": ["cat"], "kind": "thing"} | changes


def test_questions_are_read_with_images_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, row(), "", {"image": "/b.png", "question": "Who?", "answers": "dog"})
    assert read_questions(path) == [
        Question(line=1, image=tmp_path / "a.png", question="What?", answers=("cat",), kind="thing"),
        Question(line=3, image=Path("/b.png"), question="Who?", answers=("dog",)),
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        (row(image=None), '"image" must be a text that is not empty, found None'),
        (row(question=" "), '"question" must be a text'),
        (row(answers=[]), '"answers" must be a list of texts, at least one'),
        (row(answers=[7]), r"found \[7\]"),
        (row(kind=7), '"kind" must be a text, found 7'),
    ],
)
def test_malformed_row_is_kept_with_its_line_and_reason(tmp_path: Path, bad: object, reason: str) -> None:
    _, second = read_questions(write(tmp_path, row(), bad))
    assert isinstance(second, BadRow)
    assert second.line == 2
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(second.reason)


def test_empty_or_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the question file is empty"):
        read_questions(write(tmp_path, "", ""))
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read as a question file"):
        read_questions(tmp_path / "none.jsonl")


CYCLED = [kind for _ in range(50) for kind in "abcdefgh"]


SORTED = sorted(CYCLED)


UNEVEN = ["rare"] * 10 + ["common", "often"] * 100 + ["rare"] * 10


def questions_of(kinds: list[str]) -> list[Question | BadRow]:
    return [
        Question(line=line, image=Path("x.png"), question="?", answers=("yes",), kind=kind)
        for line, kind in enumerate(kinds, start=1)
    ]


@pytest.mark.parametrize("kinds", [CYCLED, SORTED, UNEVEN])
@pytest.mark.parametrize("limit", [1, 7, 8, 40, 55, 200])
def test_a_sample_has_every_kind_in_proportion(kinds: list[str], limit: int) -> None:
    counts = Counter(row.kind for row in sample(questions_of(kinds), limit) if isinstance(row, Question))
    assert counts.total() == limit
    for kind, size in Counter(kinds).items():
        assert abs(counts[kind] - limit * size / len(kinds)) <= 1


def test_a_sample_keeps_the_order_and_is_part_of_a_larger_one() -> None:
    rows = questions_of(CYCLED)
    lines = [[row.line for row in sample(rows, limit)] for limit in (20, 30, 400, 500)]
    assert all(taken == sorted(set(taken)) for taken in lines)
    assert set(lines[0]) < set(lines[1])
    assert lines[2] == lines[3] == [row.line for row in rows]
    assert lines[0] == [row.line for row in sample(rows, 20)]


def test_a_sample_is_not_taken_at_equal_distances() -> None:
    lines = [row.line for row in sample(questions_of(["a"] * 800), 100)]
    assert len(set(np.diff(lines))) > 10
