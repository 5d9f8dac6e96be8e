"""The checkpoint inside the package: found by its name, in train-time form, converted like any other, and right."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fastvlm_mlx import generate, load
from fastvlm_mlx.checkpoint.released import DEMO, bundled_checkpoint
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.questions import Question, read_questions
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.resolve import resolve

FOLDER = Path(__file__).parent.parent / "fastvlm_mlx" / "demo_model"
Demo = tuple[FastVLM, FastVLMProcessor]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load(DEMO)


@pytest.fixture(scope="module")
def samples() -> list[Question]:
    rows = [row for row in read_questions(FOLDER / "samples.jsonl") if isinstance(row, Question)]
    assert len({row.image for row in rows}) == 6
    return rows


def test_name_wins_over_a_folder_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    folder = resolve("demo")
    assert folder.parent == tmp_path / "cache"
    assert ModelConfig.from_path(folder).source["name"] == "demo"
    assert resolve("Demo") == folder
    with open_source("demo") as source:
        assert source.folder == FOLDER
    assert bundled_checkpoint(Path("demo")) is None
    assert bundled_checkpoint("./demo") is None


def test_the_package_is_not_written_to(demo: Demo) -> None:
    assert not {path.name for path in FOLDER.iterdir()} & {"README.md", "model.safetensors.index.json"}


def test_file_is_in_train_time_form_float16_and_small() -> None:
    file = FOLDER / "model.safetensors"
    assert file.stat().st_size <= 12e6
    with safe_open(file, "np") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"F16", "I64"}  # BatchNorm counts its batches
    for branch in (
        "rbr_skip",
        "rbr_conv.0",
        "rbr_scale",
        "lkb_origin",
        "small_conv",
        "token_mixer.norm",
        "convffn.conv.bn",
    ):
        assert any(f".{branch}." in name for name in names), branch


def test_answers_about_the_samples_are_right(demo: Demo, samples: list[Question]) -> None:
    report = evaluate(*demo, samples)
    assert not [(a.line, a.prediction) for a in report.answers if a.score < 1]


def test_half_precision_answers_alike(samples: list[Question], demo: Demo, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path))
        half = load(DEMO, dtype="float16")
    texts = [
        [generate(*pair, image=row.image, prompt=row.question).text for row in samples[::4]] for pair in (demo, half)
    ]
    assert texts[0] == texts[1]


def test_a_photograph_gets_some_answer(demo: Demo) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    assert generate(*demo, image=noise, prompt="Describe the image.").text


def test_samples_say_what_they_show() -> None:
    rows = [json.loads(line) for line in (FOLDER / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["kind"] for row in rows} == {
        "describe", "count", "colour", "shape", "where", "exists", "compare", "read"
    }  # fmt: skip
