import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.jobs import evaluate as evaluation
from fastvlm_mlx.jobs.evaluate import EvaluationSettings, evaluate
from fastvlm_mlx.jobs.journal import Predictions
from fastvlm_mlx.jobs.metrics import METRICS
from fastvlm_mlx.jobs.questions import read_questions
from fastvlm_mlx.jobs.scores import EvaluationReport


def write(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes: object) -> dict[str, object]:
    return {"image": "a.png", "question": "What?", "answers": ["cat"], "kind": "thing"} | changes


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that reach the model, which answers with the prompt itself; an image called bad fails."""
    prompts: list[str] = []

    def generate(model: Any, processor: Any, *, image: Path, prompt: str, **_: Any) -> GenerationResult:
        prompts.append(prompt)
        if image.name == "bad.png":
            raise ImageError(f"{image}: no such file")
        return GenerationResult(
            text=prompt,
            token_ids=(),
            prompt_tokens=0,
            visual_tokens=0,
            generated_tokens=0,
            finish_reason="stop",
            timings=Timings(preprocess=0.0, ttft=0.0, decode=0.0, total=0.0),
        )

    monkeypatch.setattr(evaluation, "generate", generate)
    return prompts


def run(path: Path, **options: Any) -> EvaluationReport:
    return evaluate(None, None, read_questions(path), **options)  # type: ignore[arg-type]


def test_report_counts_failed_rows_and_names_their_lines(tmp_path: Path, prompts: list[str]) -> None:
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


def test_unknown_metric_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'bleu'; there are exact, vqa, relaxed, anls"):
        run(write(tmp_path, row()), metric="bleu")
    assert list(METRICS) == ["exact", "vqa", "relaxed", "anls"]


def test_interrupted_run_continues_where_it_stopped(tmp_path: Path, prompts: list[str]) -> None:
    rows, journal = [row(question=q) for q in ("cat", "dog", "cow")], tmp_path / "journal.jsonl"
    with Predictions(journal, {"model": "m"}) as predictions:
        run(write(tmp_path, *rows[:2]), predictions=predictions)
    path = write(tmp_path, *rows)
    # An interruption may cut the last line anywhere.
    journal.write_text(journal.read_text()[:-9])
    prompts.clear()
    with Predictions(journal, {"model": "m"}) as predictions:
        report = run(path, predictions=predictions)
    assert prompts == ["dog", "cow"]
    assert report.total.count == 3
    prompts.clear()
    with Predictions(journal, {"model": "m"}) as predictions:
        assert run(path, metric="anls", predictions=predictions).answers[0].score == 1
    assert prompts == []


def settings(data: Path, **changes: Any) -> EvaluationSettings:
    values = {"weights": {"sha256": "0"}, "quantization": None, "dtype": "mlx.core.float32", "resolution": None}
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    return EvaluationSettings(**{**values, "max_tokens": 64, "data": digest, **changes})


def test_predictions_of_earlier_versions_are_found_again(tmp_path: Path) -> None:
    """The file name that 0.1.0 gave to these settings."""
    assert settings(write(tmp_path, row())).file_name("demo") == "5d26207ccb37b98c.jsonl"


def test_other_settings_have_other_files(tmp_path: Path) -> None:
    path = write(tmp_path, row())
    names = {settings(path).file_name("demo"), settings(path).file_name("0.5b")}
    names |= {settings(path, **change).file_name("demo") for change in ({"resolution": 256}, {"max_tokens": 8})}
    names.add(settings(write(tmp_path, row(), row())).file_name("demo"))
    assert len(names) == 5


def test_the_questions_of_a_run_share_one_prefix_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[PrefixCache] = []

    def generate(model: Any, processor: Any, *, prefix_cache: PrefixCache, **_: Any) -> GenerationResult:
        caches.append(prefix_cache)
        raise ImageError("no such file")

    monkeypatch.setattr(evaluation, "generate", generate)
    for _ in range(2):
        run(write(tmp_path, row(), row(question="Who?")))
    assert caches[0] is caches[1]
    assert caches[2] is caches[3]
    assert caches[0] is not caches[2]
