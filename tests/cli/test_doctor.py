import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app
from fastvlm_mlx.doctor import steps
from fastvlm_mlx.doctor.checks import Check, Step
from tests.checkpoints import APPLE, changed

RIGHT = Check.below("agreement", "stages.1", 1e-6, 1e-4, "the rule", "float32")
WRONG = Check.below("agreement", "stages.2", 0.5, 1e-4, "the rule", "float32")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def only(monkeypatch: pytest.MonkeyPatch, *results: Check | BaseException) -> None:
    """Replaces the steps by one that has these results, and one that has none."""

    def run() -> Iterator[Check]:
        for result in results:
            if isinstance(result, BaseException):
                raise result
            yield result

    made = [Step(name="first", run=run), Step(name="second", run=lambda: [])]
    monkeypatch.setattr(steps, "examination_steps", lambda *_: made)


def test_a_sound_machine_ends_with_0_and_one_that_is_off_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, RIGHT)
    result = invoke()
    assert result.exit_code == 0
    assert "All is well: 1 checks" in result.stdout
    only(monkeypatch, RIGHT, WRONG)
    result = invoke()
    assert result.exit_code == 3
    assert "stages.2 in float32: off by 0.5, 0.0001 is allowed" in result.stdout
    assert result.stderr == "error: something is off: 1 checks failed\n"


def test_an_interrupted_run_prints_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, RIGHT, KeyboardInterrupt())
    result = invoke()
    assert result.exit_code == 130
    assert "stages.1" in result.stdout
    assert "second  interrupted" in result.stdout


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, RIGHT, WRONG, RuntimeError("out of memory"))
    record: dict[str, Any] = json.loads(invoke("--json").stdout)
    assert [check["name"] for check in record["checks"]] == ["stages.1", "stages.2"]
    assert record["undone"] == [{"name": "first", "reason": "out of memory"}]
    assert record["ok"] is False


def test_a_model_and_random_weights_are_too_much() -> None:
    assert invoke("demo", "--random-weights", "0.5b").exit_code == 2


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Leaves steps out that take long and are tested by themselves."""
    original = steps.examination_steps
    monkeypatch.setattr(
        steps, "examination_steps", lambda *subjects: [s for s in original(*subjects) if s.name not in names]
    )


def test_a_whole_examination_of_a_small_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = [f"the compiled tower in {precision}" for precision in ("float32", "float16")]
    speed = ("time to first token", "speed of the segments", "throughput of batches", "cold start")
    without(monkeypatch, "questions to the demo model", *compiled, *speed)
    result = invoke(str(APPLE / "reparam"), "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == (0 if record["ok"] else 3)
    assert not record["undone"]
    assert not [check for check in record["checks"] if check["part"] == "agreement" and not check["ok"]]
    assert record["model"] == "a model on disk"
    assert str(APPLE) not in result.stdout
    assert str(tmp_path) not in result.stdout


def test_a_model_that_does_not_load_is_named_and_the_machine_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "questions to the demo model")
    folder = changed(APPLE / "reparam", tmp_path / "broken", edit=lambda values: values.pop("lm_head.weight", None))
    (folder / "model.safetensors").write_bytes(b"nothing")
    result = invoke(str(folder), "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 3
    (check,) = [check for check in record["checks"] if check["name"] == "the model"]
    assert (check["value"], check["ok"]) == ("does not load", False)
    assert {each["reason"] for each in record["undone"]} == {"the model did not load"}
    assert len(record["undone"]) > 10
    assert str(tmp_path) not in result.stdout
    assert any(check["name"] == "device" for check in record["checks"])


def test_weights_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spoil(values: dict[str, Any]) -> None:
        values["model.mm_projector.2.weight"] = values["model.mm_projector.2.weight"] * float("nan")

    original = steps.examination_steps
    named = ("loading the model", "weights")
    monkeypatch.setattr(steps, "examination_steps", lambda *a: [s for s in original(*a) if s.name in named])
    result = invoke(str(changed(APPLE / "reparam", tmp_path / "nan", edit=spoil)))
    assert result.exit_code == 3
    assert "mm_projector.2.weight" in result.stdout
