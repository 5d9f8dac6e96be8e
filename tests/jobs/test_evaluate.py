import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs import evaluate as evaluation
from fastvlm_mlx.jobs.evaluate import evaluate, prediction_settings
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.metrics import METRICS
from fastvlm_mlx.jobs.predictions import Predictions
from fastvlm_mlx.jobs.questions import Question, read_questions
from fastvlm_mlx.jobs.scores import EvaluationReport
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.checkpoints import APPLE


def write(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(b"cat")
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes: object) -> dict[str, object]:
    return {"image": "a.png", "question": "What?", "answers": ["cat"], "kind": "thing"} | changes


class Asked:
    """In the place of an engine: notes each request, and answers with its prompt."""

    requests: list[Request]

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def map(self, requests: Iterable[Request]) -> Iterator[Handle]:
        for request in requests:
            self.requests.append(request)
            handle = Handle(request)
            handle.add(
                [
                    GenerationResult(
                        text=str(request.prompt),
                        token_ids=(),
                        prompt_tokens=0,
                        visual_tokens=0,
                        generated_tokens=0,
                        finish_reason="stop",
                        timings=Timings(preprocess=0.0, ttft=0.0, decode=0.0, total=0.0),
                    )
                ]
            )
            handle.end()
            yield handle


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach the engine, which answers with the prompt itself."""
    asked: list[Request] = []
    monkeypatch.setattr(Asked, "requests", asked, raising=False)
    monkeypatch.setattr(evaluation, "Engine", Asked)
    return asked


def run(path: Path, **options: Any) -> EvaluationReport:
    return evaluate(None, None, read_questions(path), **options)  # type: ignore[arg-type]


def test_report_counts_failed_rows_and_names_their_lines(tmp_path: Path, requests: list[Request]) -> None:
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
    assert ticks == [(0, 4), (1, 4), (2, 4), (4, 4)]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["failed"][1] == {"line": 4, "error": f"{tmp_path / 'bad.png'}: no such file"}
    assert [cells[0] for cells in report.table()] == ["thing", "other", "malformed", "all"]
    assert report.table()[-1][:3] == ("all", "4", "25.0")


def test_a_setting_that_fits_no_row_ends_the_evaluation(
    loaded: tuple[FastVLM, FastVLMProcessor], tmp_path: Path
) -> None:
    rows = [Question(line=1, image=APPLE / "images" / "tiny.png", question="What?", answers=("cat",))]
    with pytest.raises(ConfigError, match="resolution must be a multiple of 64"):
        evaluate(*loaded, rows, resolution=100)


def test_unknown_metric_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric must be exact, vqa, relaxed or anls, not 'bleu'"):
        run(write(tmp_path, row()), metric="bleu")
    assert list(METRICS) == ["exact", "vqa", "relaxed", "anls"]


def test_interrupted_run_continues_where_it_stopped(tmp_path: Path, requests: list[Request]) -> None:
    rows = [row(question=question) for question in ("cat", "dog", "cow")]
    with Predictions(tmp_path, {}) as predictions:
        run(write(tmp_path, *rows[:2]), predictions=predictions)
    path = write(tmp_path, *rows)
    requests.clear()
    with Predictions(tmp_path, {}) as predictions:
        report = run(path, predictions=predictions)
    assert [request.prompt for request in requests] == ["cow"]
    assert [answer.kept for answer in report.answers] == [True, True, False]
    assert (report.kept, report.to_dict()["from_cache"]) == (2, 2)
    requests.clear()
    with Predictions(tmp_path, {}) as predictions:
        assert run(path, metric="anls", predictions=predictions).answers[0].score == 1
    assert requests == []


def test_a_question_that_occurs_twice_does_not_count_as_kept(tmp_path: Path, requests: list[Request]) -> None:
    with Predictions(tmp_path, {}) as predictions:
        assert run(write(tmp_path, row(), row()), predictions=predictions).kept == 0


def test_an_image_that_changed_under_its_name_is_asked_about_again(tmp_path: Path, requests: list[Request]) -> None:
    path, image = write(tmp_path, row()), tmp_path / "a.png"
    status = image.stat()
    for content in (b"cat", b"dog", b"cat"):
        image.write_bytes(content)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
        with Predictions(tmp_path, {}) as predictions:
            run(path, predictions=predictions)
    assert len(requests) == 2
    (tmp_path / "elsewhere").mkdir()
    with Predictions(tmp_path, {}) as predictions:
        assert run(write(tmp_path / "elsewhere", row()), predictions=predictions).kept == 1


def test_what_is_asked_is_what_the_prediction_is_kept_for(tmp_path: Path, requests: list[Request]) -> None:
    run(write(tmp_path, row(), row(image="data:image/png;base64,aGVsbG8=")))
    images: list[Any] = [request.image for request in requests]
    assert [(image.name, image.read()) for image in images] == [
        (str(tmp_path / "a.png"), b"cat"),
        ("data:image/png;base64,aGVsbG8=…", b"hello"),
    ]


def test_settings_are_all_that_a_prediction_depends_on(
    loaded: tuple[FastVLM, FastVLMProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    settings = [
        prediction_settings(model, "0"),
        prediction_settings(model, "1"),
        prediction_settings(model, "0", resolution=256),
        prediction_settings(model, "0", max_tokens=8),
    ]
    monkeypatch.setattr(evaluation, "__version__", "9.9")
    settings.append(prediction_settings(model, "0"))
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "device", lambda: "another")
    settings.append(prediction_settings(model, "0"))
    assert len({fingerprint(values) for values in settings}) == len(settings)
    assert settings[0]["dtype"] == "mlx.core.float32"


def test_records_hold_what_was_asked_and_answered(tmp_path: Path, requests: list[Request]) -> None:
    path = write(tmp_path, row(question="Cat!"), "{", row(image="bad.png"))
    asked, malformed, failed = run(path).records(read_questions(path))
    assert asked == {
        "line": 1,
        "image": str(tmp_path / "a.png"),
        "question": "Cat!",
        "kind": "thing",
        "answers": ["cat"],
        "prediction": "Cat!",
        "score": 1.0,
        "tokens": 0,
        "from_cache": False,
        "error": None,
    }
    assert (malformed["line"], malformed["question"], malformed["kind"]) == (2, None, "malformed")
    assert (failed["prediction"], failed["score"]) == (None, 0.0)
    assert "bad.png" in failed["error"]
