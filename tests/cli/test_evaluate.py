"""`fastvlm eval` on the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli.app import app
from fastvlm_mlx.generation.generate import generate
from tests.checkpoints import GOLDEN

Questions = Callable[..., str]


@pytest.fixture
def model(converted: Callable[..., Path]) -> str:
    return str(converted("apple"))


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Questions:
    """Writes a question file about a golden image; the answer cache is empty."""
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    shutil.copy(GOLDEN / "apple" / "images" / "tiny.png", tmp_path / "tiny.png")

    def write(*rows: object) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def row(question: str = "What is it?", image: str = "tiny.png", **more: object) -> dict[str, object]:
    return {"image": image, "question": question, "answers": ["nothing"], **more}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", "-n", "4", *arguments])


def test_a_table_by_kind_is_printed(model: str, questions: Questions) -> None:
    result = run("-m", model, "--data", questions(row(kind="what"), row("Is there a cat?", kind="exists")))
    assert result.exit_code == 0
    header, what, exists, total = result.stdout.splitlines()
    assert header.split() == ["kind", "questions", "exact", "%", "95", "%", "interval"]
    assert (what.split()[:3], exists.split()[:3]) == (["what", "1", "0.0"], ["exists", "1", "0.0"])
    assert total.split()[:3] == ["all", "2", "0.0"]


def test_a_model_agrees_with_itself(model: str, questions: Questions) -> None:
    result = run("-m", model, "--baseline", model, "--data", questions(row(), row("Where?")), "--json")
    record = json.loads(result.stdout)
    assert record["total"]["count"] == 2
    assert record["baseline"]["agreement"]["score"] == 1.0
    assert record["baseline"]["difference"] == 0.0


def test_failed_rows_are_named_and_end_with_3(model: str, questions: Questions) -> None:
    data = questions(row(), row(image="missing.png"), "{broken")
    result = run("-m", model, "--data", data)
    assert result.exit_code == 3
    assert f"{data}:2: " in result.stderr
    assert "missing.png" in result.stderr
    assert f"{data}:3: " in result.stderr
    assert "2 of 3 rows failed" in result.stderr


def test_a_limit_asks_about_every_kind_alike(model: str, questions: Questions) -> None:
    kinds = ("describe", "count", "colour", "shape", "where", "exists", "compare", "read")
    rows = [row(f"{kind} {number}?", kind=kind) for number in range(4) for kind in kinds]
    record = json.loads(run("-m", model, "--data", questions(*rows), "--limit", "16", "--json").stdout)
    assert {kind: share["count"] for kind, share in record["kinds"].items()} == dict.fromkeys(kinds, 2)


def test_an_interrupted_run_continues_where_it_stopped(
    model: str, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = questions(row(), row("Where?"), row("Why?"))
    prompts: list[str] = []

    def interrupted(*args: Any, **options: Any) -> Any:
        prompts.append(options["prompt"])
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr("fastvlm_mlx.jobs.evaluate.generate", interrupted)
    assert run("-m", model, "--data", data).exit_code == 130
    assert run("-m", model, "--data", data).exit_code == 0
    assert prompts == ["What is it?", "Where?", "Where?", "Why?"]


def test_wrong_arguments_are_refused(model: str, questions: Questions) -> None:
    assert "is not one of exact, vqa, relaxed, anls" in run("-m", model, "--data", "x", "--metric", "bleu").stderr
    empty = run("-m", model, "--data", questions())
    assert (empty.exit_code, empty.stderr.count("\n")) == (1, 1)
    assert "the question file is empty" in empty.stderr
