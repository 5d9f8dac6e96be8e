import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.questions import BadRow, Question, check_images, read_questions, sample


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


def test_images_are_named_as_everywhere_else(tmp_path: Path) -> None:
    names = ["https://a.example/1.png", "data:image/png;base64,AAAA", "~/1.png", "/1.png", "\udcff.png"]
    images = [row.image for row in read_questions(write(tmp_path, *(row(image=name) for name in names))) if row.image]
    assert images == [*names[:2], Path("~/1.png"), Path("/1.png"), tmp_path / "\udcff.png"]
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "1.png").touch()
    (beside,) = read_questions(write(tmp_path, row(image="~/1.png")))
    assert isinstance(beside, Question)
    assert beside.image == tmp_path / "~" / "1.png"


def test_only_line_feeds_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    questions = ["one\u2028two", "one\u0085two", "one\u2029two"]
    lines = [json.dumps(row(question=question), ensure_ascii=False) for question in questions]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, '{"image":\f"a.png"}']).encode())
    rows = read_questions(path)
    assert [row.question for row in rows if isinstance(row, Question)] == questions
    assert [row.line for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("[" * 200_000, "nested too deeply"),
        (
            '{"image": "a", "question": "b", "answers": ' + "[" * 900 + "]" * 900 + "}",
            '"answers" must be a list of texts',
        ),
        ('{"image": "a", "question": "b", "answers": [' + "9" * 5000 + "]}", '"answers" must be|digits'),
        (row(image=None), '"image" must be a text that is not empty, found None'),
        (row(question=" "), '"question" must be a text'),
        (row(question="\ud83d"), r'"question" holds half of a surrogate pair, which is no character: .\\ud83d'),
        (row(kind="\udcff"), '"kind" holds half of a surrogate pair'),
        (row(answers=[]), '"answers" must be a list of texts, at least one'),
        (row(answers=[7]), r"found \[7\]"),
        (row(answers=[float("nan")]), r"found \[nan\]"),
        (row(answers=[7] * 10_000), '"answers" must be a list of texts'),
        (row(kind=7), '"kind" must be a text, found 7'),
        (row(kind="\n" * 9, question=3), '"question" must be a text'),
    ],
)
def test_malformed_row_is_kept_with_its_line_and_reason(tmp_path: Path, bad: object, reason: str) -> None:
    _, second = read_questions(write(tmp_path, row(), bad))
    assert isinstance(second, BadRow)
    assert second.line == 2
    assert re.search(reason, second.reason)
    assert second.reason.isprintable()
    assert len(second.reason) <= 200


def test_a_row_that_is_not_utf8_is_malformed(tmp_path: Path) -> None:
    path = write(tmp_path, row(), row())
    path.write_bytes(path.read_bytes() + b'{"image": "\xff"}\n')
    _, _, bad = read_questions(path)
    assert bad == BadRow(line=3, reason="not UTF-8 (invalid start byte at byte 11)")


def test_empty_or_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the question file is empty"):
        read_questions(write(tmp_path, "", ""))
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read as a question file: No such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read as a question file: Is a directory"):
        read_questions(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read as a question file: .*surrogates not allowed"):
        read_questions(tmp_path / "\ud800")
    for other in (tmp_path / "a\0b", 5, None):
        with pytest.raises(ConfigError, match="path must be a path, not"):
            read_questions(other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", ["# A title\n\nSome text.\n", "[\n{}\n]\n", "image,question\n1.jpg,What?\n", "\0\0"]
)
def test_a_file_without_a_question_is_one_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"README\.md: holds no question; line 1: .*; expected rows like {\"image\""
    ) as raised:
        read_questions(path)
    assert str(raised.value).isprintable()


def test_a_file_without_its_images_is_one_error(tmp_path: Path) -> None:
    rows = read_questions(path := write(tmp_path, row(), row(image="b.png")))
    with pytest.raises(
        ConfigError, match=r"questions\.jsonl: none of its images exists, such as .*a\.png; their paths"
    ):
        check_images(path, rows)
    (tmp_path / "b.png").touch()
    check_images(path, rows)
    check_images(path, read_questions(write(tmp_path, row(image="https://a.example/1.png"))))


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
