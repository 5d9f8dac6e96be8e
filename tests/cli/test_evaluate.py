"""`fastvlm eval` on the command line."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from fastvlm_mlx import Engine, Handle, Request
from fastvlm_mlx.cli.app import app
from fastvlm_mlx.jobs.journal import Journal
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


def test_the_baselines_own_scores_appear(model: str, questions: Questions) -> None:
    data = questions(row(), row("Where?", kind="where"))
    record = json.loads(run("-m", model, "--baseline", model, "--data", data, "--json").stdout)
    shares = ("count", "score", "low", "high")
    assert tuple(record["baseline"]["total"]) == tuple(record["total"]) == shares
    assert tuple(record["baseline"]["kinds"]) == tuple(record["kinds"]) == ("other", "where")
    header, *rows = run("-m", model, "--baseline", model, "--data", data).stdout.splitlines()[:4]
    assert header.endswith("exact %  95 % interval  baseline %  95 % interval")
    assert [cells[2:6] == cells[6:10] for cells in map(str.split, rows)] == [True] * 3


def test_output_holds_question_answer_and_score_of_each_row(model: str, questions: Questions, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    data = questions(row("What\u2028is it?"), "{broken", row(image="missing.png"))
    for kept in (False, True):
        assert run("-m", model, "--data", data, "--output", str(output), "--baseline", model).exit_code == 3
        first, broken, missing = (json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1])
        assert {name: first[name] for name in ("line", "image", "question", "kind", "answers", "score")} == {
            "line": 1,
            "image": str(tmp_path / "tiny.png"),
            "question": "What\u2028is it?",
            "kind": "other",
            "answers": ["nothing"],
            "score": 0.0,
        }
        assert (first["from_cache"], first["tokens"]) == (kept, 4)
        assert first["prediction"] == first["baseline_prediction"]
        assert (broken["prediction"], broken["score"]) == (None, 0.0)
        assert "not valid JSON" in broken["error"]
        assert "missing.png" in missing["error"]


def test_the_questions_are_not_overwritten(model: str, questions: Questions) -> None:
    data = questions(row())
    before = Path(data).read_bytes()
    result = run("-m", model, "--data", data, "--output", data)
    assert (result.exit_code, "is the file of questions; name another" in result.stderr) == (2, True)
    assert Path(data).read_bytes() == before


def test_answers_of_an_earlier_run_are_announced_and_fresh_asks_again(model: str, questions: Questions) -> None:
    data = questions(row(), row("Where?"), row("Why?"))
    name = f"{model}: " + "{} of 3 answers are from an earlier run; --fresh asks again\n"
    assert run("-m", model, "--data", data, "--limit", "2").stderr == ""
    assert run("-m", model, "--data", data).stderr == name.format(2)
    assert run("-m", model, "--data", data, "--fresh").stderr == ""
    assert run("-m", model, "--data", data).stderr == name.format(3)


def test_weights_that_were_exchanged_in_place_are_asked_anew(model: str, questions: Questions, tmp_path: Path) -> None:
    data, folder = questions(row()), tmp_path / "model"
    shutil.copytree(model, folder)
    kept = []
    for scale in (1.0, 1.0, -1.0, 1.0):
        weights = load_file(Path(model) / "model.safetensors")
        scaled = {name: np.asarray(array * scale, array.dtype) for name, array in weights.items()}
        save_file(scaled, folder / "model.safetensors")
        os.utime(folder / "model.safetensors", (1, 1))
        record = json.loads(run("-m", str(folder), "--data", data, "--json").stdout)
        kept.append(record["from_cache"])
    assert kept == [0, 1, 0, 1]


def test_a_checkpoint_is_known_by_its_content_under_any_name(model: str, questions: Questions, tmp_path: Path) -> None:
    data = questions(row())
    assert json.loads(run("-m", model, "--data", data, "--json").stdout)["from_cache"] == 0
    shutil.copytree(model, tmp_path / "copy")
    assert json.loads(run("-m", str(tmp_path / "copy"), "--data", data, "--json").stdout)["from_cache"] == 1
    (tmp_path / "copy" / "vocab.json").write_text("{}")  # beside tokenizer.json, but who knows
    assert json.loads(run("-m", str(tmp_path / "copy"), "--data", data, "--json").stdout)["from_cache"] == 0


def test_kept_answers_that_are_damaged_are_asked_again_once_with_a_note(model: str, questions: Questions) -> None:
    data = questions(row(), row("Where?"))
    assert run("-m", model, "--data", data).stderr == ""
    (kept,) = (Path(data).parent / "cache" / "eval").iterdir()
    whole = kept.read_bytes()
    old = b'{"data": "x", "fastvlm_predictions": 1}\n{"key": "abc", "prediction": "3"}\n'
    for content, answers in ((b"", 0), (whole[:50], 0), (old, 0), (b"\0\0\n" + whole, 2), (b"\xff" + whole, 1)):
        kept.write_bytes(content)
        noted, silent = (run("-m", model, "--data", data) for _ in range(2))
        assert (noted.exit_code, silent.exit_code) == (0, 0)
        assert ("damaged line" in noted.stderr) == bool(content)
        assert (f"{answers} of 2 answers" in noted.stderr) == bool(answers)
        assert silent.stderr == f"{model}: 2 of 2 answers are from an earlier run; --fresh asks again\n"


def test_answers_that_cannot_be_kept_are_given_all_the_same(model: str, questions: Questions) -> None:
    data = questions(row())
    folder = Path(data).parent / "cache" / "eval"
    run("-m", model, "--data", data)
    (kept,) = folder.iterdir()
    with Journal(kept):
        result = run("-m", model, "--data", data)
    assert result.exit_code == 0
    assert result.stderr == f"answers are not kept ({kept}: another run is writing this file)\n"
    kept.unlink()
    kept.mkdir()
    result = run("-m", model, "--data", data)
    assert (result.exit_code, result.stderr) == (0, f"answers are not kept (Is a directory: {kept})\n")


@pytest.mark.parametrize("content", ["# Title\n" * 200, '{"image": "missing.png", "question": "?", "answers": "a"}\n'])
def test_a_wrong_file_of_questions_is_one_message(model: str, questions: Questions, content: str) -> None:
    data = questions(content)
    result = run("-m", model, "--data", data)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(f"error: {data}: ")


def test_what_is_wrong_with_all_rows_is_said_once(model: str, questions: Questions) -> None:
    result = run("-m", model, "--data", questions(row()), "--baseline", "./missing")
    assert (result.exit_code, result.stderr.count("\n"), "missing" in result.stderr) == (1, 1, True)
    data = questions(row(), *[row(image="missing.png")] * 7)
    result = run("-m", model, "--data", data)
    assert f"{data}: lines 2, 3, 4, 5, 6 and 2 more: " in result.stderr
    assert result.stderr.count("missing.png") == 1


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
    data = questions(*(row(f"{number}?") for number in range(6)))
    prompts: list[Any] = []

    class Interrupted(Engine):
        def map(self, requests: Iterable[Request]) -> Iterator[Handle]:
            for handle in super().map(requests):
                prompts.append(handle.request.prompt)
                if len(prompts) == 3:
                    raise KeyboardInterrupt
                yield handle

    monkeypatch.setattr("fastvlm_mlx.jobs.evaluate.Engine", Interrupted)
    assert run("-m", model, "--data", data).exit_code == 130
    assert run("-m", model, "--data", data).exit_code == 0
    assert prompts == ["0?", "1?", "2?", "2?", "3?", "4?", "5?"]


def test_wrong_arguments_are_refused(model: str, questions: Questions) -> None:
    assert (
        "is not one of 'exact', 'vqa', 'relaxed', 'anls'" in run("-m", model, "--data", "x", "--metric", "bleu").stderr
    )
    empty = run("-m", model, "--data", questions())
    assert (empty.exit_code, empty.stderr.count("\n")) == (1, 1)
    assert "the question file is empty" in empty.stderr
