import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.generation.generate import GenerationResult
from fastvlm_mlx.jobs import evaluate as evaluation
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.journal import Predictions
from fastvlm_mlx.jobs.metrics import METRICS, anls, exact_match, normalize, relaxed_numeric, vqa_accuracy
from fastvlm_mlx.jobs.questions import BadRow, Question, read_questions, sample
from fastvlm_mlx.jobs.scores import Answer, EvaluationReport, Share


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A red circle.", "red circle"),
        ("  THE   end\n", "end"),
        ("Three", "3"),
        ("1,234", "1234"),
        ("3.50", "3.50"),
        ("-7 °C", "-7 °c"),
        ("well-known", "well known"),
        ("有。", "有"),
        ("ＡＢＣ", "abc"),
        ("A", "a"),
        ("", ""),
    ],
)
def test_case_punctuation_articles_and_number_words_do_not_count(text: str, same: str) -> None:
    assert normalize(text) == same


def test_exact_match_takes_any_of_the_answers() -> None:
    assert exact_match("Two.", ["2", "a pair"]) == 1
    assert exact_match("22", ["2"]) == 0


def test_vqa_accuracy_leaves_each_annotator_out() -> None:
    people = ["red", "red", "red", "dark red", "orange", "red", "maroon", "red", "crimson", "pink"]
    assert vqa_accuracy("red", people) == 1
    # One of ten: 0 where that one is left out, a third for the other nine.
    assert vqa_accuracy("pink", people) == pytest.approx(0.3)
    assert vqa_accuracy("blue", people) == 0
    assert vqa_accuracy("yes", ["Yes."]) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("104", "100", 1),
        ("106", "100", 0),
        ("95%", "100 %", 1),
        ("$1,020", "1000", 1),
        ("red", "Red", 1),
        ("0", "0", 1),
    ],
)
def test_relaxed_numeric_allows_five_per_cent(prediction: str, answer: str, score: float) -> None:
    assert relaxed_numeric(prediction, [answer]) == score


def test_anls_falls_with_each_wrong_character_and_ends_at_one_half() -> None:
    assert anls("HOTEL", ["hotel"]) == 1
    assert anls("HOTAL", ["hotel", "motel"]) == pytest.approx(0.8)
    assert anls("HAT", ["hotel"]) == 0
    assert anls("", ["hotel"]) == 0


def test_wilson_interval_matches_the_published_example() -> None:
    # 15 of 148 (Newcombe 1998, table I, method 3): 0.0624 to 0.1605.
    share = Share.of([1.0] * 15 + [0.0] * 133)
    assert (share.low, share.high) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))
    assert Share.of([1.0] * 20).high == 1
    for n in range(1, 300):
        for score in (0.0, 1.0):
            share = Share.of([score] * n)
            assert share.low <= share.score <= share.high


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that reach the model, which answers with the question itself; an image called bad fails."""
    questions: list[str] = []

    def generate(model: Any, processor: Any, *, image: Path, prompt: str, **_: Any) -> GenerationResult:
        questions.append(prompt)
        if image.name == "bad.png":
            raise ImageError(f"{image}: no such file")
        return GenerationResult(
            text=prompt,
            token_ids=(),
            prompt_tokens=0,
            visual_tokens=0,
            generated_tokens=0,
            finish_reason="stop",
            timings={},
        )

    monkeypatch.setattr(evaluation, "generate", generate)
    return questions


def run(path: Path, **options: Any) -> EvaluationReport:
    return evaluate(None, None, read_questions(path), **options)  # type: ignore[arg-type]


def test_report_counts_failed_rows_and_names_their_lines(tmp_path: Path, asked: list[str]) -> None:
    path = write(
        tmp_path, row(question="Cat!"), row(question="dog", kind="other"), "{", row(image="bad.png", question="cat")
    )
    ticks: list[tuple[int, int]] = []
    report = run(path, progress=lambda done, total: ticks.append((done, total)))
    assert {kind: (share.count, share.score) for kind, share in report.kinds.items()} == {
        "thing": (2, 0.5),
        "other": (1, 0),
        "malformed": (1, 0),
    }
    assert report.total.score == 0.25
    assert [answer.line for answer in report.failed] == [3, 4]
    assert ticks == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["failed"][1] == {"line": 4, "error": f"{tmp_path / 'bad.png'}: no such file"}
    assert [cells[0] for cells in report.table()] == ["thing", "other", "malformed", "all"]
    assert report.table()[-1][:3] == ("all", "4", "25.0")


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


def test_unknown_metric_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'bleu'; there are exact, vqa, relaxed, anls"):
        run(write(tmp_path, row()), metric="bleu")
    assert list(METRICS) == ["exact", "vqa", "relaxed", "anls"]


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, asked: list[str]) -> None:
    rows, kept = [row(question=q) for q in ("cat", "dog", "cow")], tmp_path / "kept.jsonl"
    with Predictions(kept, {"model": "m"}) as predictions:
        run(write(tmp_path, *rows[:2]), predictions=predictions)
    path = write(tmp_path, *rows)
    # An interruption may cut the last line anywhere.
    kept.write_text(kept.read_text()[:-9])
    asked.clear()
    with Predictions(kept, {"model": "m"}) as predictions:
        report = run(path, predictions=predictions)
    assert asked == ["dog", "cow"]
    assert report.total.count == 3
    asked.clear()
    with Predictions(kept, {"model": "m"}) as predictions:
        assert run(path, metric="anls", predictions=predictions).answers[0].score == 1
    assert asked == []


def test_predictions_of_other_settings_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    with Predictions(kept, {"model": "m"}):
        pass
    with pytest.raises(ConfigError, match=r"holds no predictions of this model with these settings; delete it"):
        Predictions(kept, {"model": "other"})


def report(*predictions: str | None) -> EvaluationReport:
    return EvaluationReport(
        metric="exact",
        answers=tuple(
            Answer(line=i, kind="k", prediction=p, score=float(p == "cat"), error="gone" if p is None else None)
            for i, p in enumerate(predictions)
        ),
    )


def test_comparison_is_paired() -> None:
    comparison = report("cat", "cat", "dog", "Cow", None).against(report("cat", "dog", "cat", "cow", None))
    assert comparison.agreement.score == 0.6
    assert (comparison.difference, comparison.won, comparison.lost) == (0, 1, 1)
    # Differences 0, 1, -1, 0, 0: standard error sqrt(0.5 / 5).
    assert comparison.high == pytest.approx(1.96 * math.sqrt(0.1), rel=1e-3)
    assert comparison.low == -comparison.high


def test_reports_on_different_rows_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="only on the same questions and metric"):
        report("cat").against(report("cat", "dog"))
