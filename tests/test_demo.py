import hashlib
import json
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest

from fastvlm_mlx.jobs.questions import Question, read_questions

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    pytest.importorskip("matplotlib")
    from demo import scenes

    return scenes


@pytest.fixture
def demo_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a script of demo/ import its neighbours, as it can when it is run."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "demo")


def test_scene_follows_from_its_seed(scenes: ModuleType) -> None:
    first, second, other = (scenes.scene_of(seed, 3, held_out=False) for seed in (1, 1, 2))
    assert first[1] == second[1]
    assert np.array_equal(first[0], second[0])
    assert first[0].size != other[0].size or not np.array_equal(first[0], other[0])


def test_shapes_stay_inside_and_apart_and_off_the_text(scenes: ModuleType) -> None:
    rng = Random(0)
    counts = Counter()
    for _ in range(60):
        image, scene = scenes.render(rng, 256)
        assert 0.49 < image.width / image.height < 2.05
        counts[len(scene.shapes)] += 1
        for i, a in enumerate(scene.shapes):
            assert a.radius <= a.x <= scene.width - a.radius
            assert a.radius <= a.y <= scene.height - a.radius
            for b in scene.shapes[i + 1 :]:
                assert a.name != b.name
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.9 * (a.radius + b.radius)
            for text in scene.texts:
                left, top, right, bottom = text.box
                assert not (left < a.x < right and top < a.y < bottom)
    assert set(counts) == {1, 2, 3, 4, 5}


def test_answers_are_true(scenes: ModuleType) -> None:
    shapes = (
        scenes.Shape(shape="ring", colour="red", size="small", x=40, y=50, radius=14),
        scenes.Shape(shape="star", colour="red", size="large", x=90, y=200, radius=33),
        scenes.Shape(shape="star", colour="blue", size="small", x=200, y=190, radius=14),
    )
    text = scenes.Text(text="1234", box=(100, 10, 160, 34), centres=())
    scene = scenes.Scene(width=256, height=256, shapes=shapes, texts=(text,))
    rng = Random(0)
    found = {(q.question, q.answer) for kind in scenes.KINDS for _ in range(300) if (q := scenes.ask(scene, rng, kind))}
    assert ("Describe the image.", "A red ring, a red star and a blue star.") in found
    assert ("描述这张图片。", "红色的环形、红色的星形和蓝色的星形。") in found
    assert ("How many stars are there?", "2") in found
    assert ("What colour is the ring?", "red") in found
    assert ("Which shape is blue?", "star") in found
    assert ("Where is the blue star relative to the red star?", "right") in found
    assert ("Is the red ring above or below the red star?", "above") in found
    assert ("Which is larger, the red star or the blue star?", "the red star") in found
    assert ("Is there a red star?", "yes") in found
    assert ("Which number is printed?", "1234") in found
    # Not asked: what has two answers or is too close to tell.
    questions = " ".join(question for question, _ in found)
    assert "What colour is the star?" not in questions
    assert "Which shape is red?" not in questions
    assert "Is the blue star above or below the red star?" not in questions
    assert "Which is larger, the red ring or the blue star?" not in questions


def test_practice_has_longer_numbers(scenes: ModuleType) -> None:
    def long_numbers(practice: bool) -> int:
        drawn = (scenes.render(Random(i), 64, practice=practice)[1].texts for i in range(300))
        return sum(len(text.text) > 2 and text.text.isdigit() for texts in drawn for text in texts)

    # Of 300 pictures 85 % have a text: 19 % of them long numbers without practice (57 expected), 42 % with it (127).
    assert long_numbers(False) < 90 < long_numbers(True)


def test_yes_and_no_are_balanced(scenes: ModuleType) -> None:
    rng = Random(0)
    answers = Counter(scenes.ask(scenes.render(rng, 64)[1], rng, "exists").answer for _ in range(400))
    assert {"yes", "no", "有", "没有"} == set(answers)
    # Half of 400 within four standard deviations.
    assert abs(answers["yes"] + answers["有"] - 200) < 40


def test_question_file_is_one_that_eval_reads(scenes: ModuleType, tmp_path: Path) -> None:
    scenes.write_questions(tmp_path, 16, 7, held_out=True)
    rows = read_questions(tmp_path / "questions.jsonl")
    assert Counter(row.kind for row in rows if isinstance(row, Question)) == dict.fromkeys(scenes.KINDS, 2)
    assert all(row.image.is_file() for row in rows if isinstance(row, Question))


# The train-time model


@pytest.mark.parametrize("name", ["apple", "apple_untied"])
def test_train_time_model_computes_what_apples_does(name: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from demo.model import FastVLM

    model = FastVLM.load(GOLDEN / name / "train")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        features = model.tower(expected["landscape.pixel_values"][None])[-1]
        embeds = expected["landscape.inputs_embeds"][None]
        length = embeds.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        logits = model.logits(model.decode(embeds, torch.arange(length), mask)[-1])[0, -1]
        found = {"features": features[0].flatten(1).T, "projected": model.project(features)[0], "logits": logits}
    for stage, value in found.items():
        wanted = expected[f"landscape.{stage}"]
        # float32, summed in another order
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_trainer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    import subprocess
    import sys

    train = Path(__file__).parent.parent / "demo" / "train.py"
    options = ["--batch", "2", "--workers", "0", "--log-every", "1", "--eval-every", "1", "--eval-batches", "1"]
    for steps, stages in ((1, "100"), (3, "111")):
        command = [sys.executable, train, "--run", tmp_path, *options, "--steps", str(steps), "--stages", *stages]
        subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The tower alone, then the decoder on the frozen tower, then both.
    assert [("text" in row, "answers" in row) for row in rows] == [(True, False), (False, True), (True, True)]
    subprocess.run([sys.executable, train, "--run", tmp_path, "--export", tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 12e6


# The figures


def test_seeds_of_the_figures_come_from_the_weights(scenes: ModuleType, demo_path: None) -> None:
    from demo import evaluate

    assert evaluate.seeds_of("00010010ffff0abc8000" + "1" * 44) == [1, 16, 65535, 2748, 32768]
    shipped = json.loads((evaluate.HERE / "evaluation.json").read_text())
    digest = hashlib.sha256(evaluate.WEIGHTS.read_bytes()).hexdigest()
    assert (shipped["sha256"], shipped["seeds"]) == (digest, evaluate.seeds_of(digest))
    assert shipped["model"] == "demo"


def test_figures_pool_the_seeds(scenes: ModuleType, demo_path: None) -> None:
    from demo import evaluate

    full = {kind: {"count": 100, "score": 1.0} for kind in scenes.KINDS}
    table = evaluate.summarize([full, {**full, "read": {"count": 300, "score": 0.8}}])
    assert table["all but read"]["score"] == 1
    assert table["all but read"]["count"] == 1400
    assert table["read"]["score"] == pytest.approx(0.85)
    assert table["read"]["by_seed"] == [1, 0.8]
    assert table["read"]["deviation"] == pytest.approx(0.2 / 2**0.5)
    # Wilson's interval of 340 of 400, as in tables.
    assert (table["read"]["low"], table["read"]["high"]) == pytest.approx((0.8116, 0.8817), abs=1e-4)


def test_paired_difference_pools_the_seeds(scenes: ModuleType, demo_path: None) -> None:
    from demo import evaluate

    def seed(count: int, won: int, lost: int, agreement: float) -> dict[str, object]:
        return {"agreement": {"count": count, "score": agreement}, "won": won, "lost": lost}

    pooled = evaluate.paired([seed(100, 3, 1, 0.9), seed(300, 1, 11, 0.7)])
    assert (pooled["count"], pooled["won"], pooled["lost"]) == (400, 4, 12)
    assert pooled["agreement"] == pytest.approx(0.75)
    assert pooled["difference"] == pytest.approx(-0.02)
    scores = np.array([1] * 4 + [-1] * 12 + [0] * 384)
    half = 1.96 * scores.std(ddof=1) / 400**0.5
    assert (pooled["low"], pooled["high"]) == pytest.approx((-0.02 - half, -0.02 + half), abs=1e-6)


def test_other_figures_use_the_first_seed(
    scenes: ModuleType, demo_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "QUESTIONS", 2)
    file = evaluate.first_questions()
    seed = json.loads((evaluate.HERE / "evaluation.json").read_text())["seeds"][0]
    assert file == evaluate.DATA / str(seed) / "questions.jsonl"
    assert len(read_questions(file)) == 2


@pytest.mark.parametrize("script", ["resolution", "quantization"])
def test_tracked_figures_are_overwritten_only_on_demand(
    scenes: ModuleType, demo_path: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    evaluate, module = import_module("evaluate"), import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "HERE", tmp_path / "tracked")
    for name in ("measure", "table"):
        monkeypatch.setattr(module, name, lambda *_: "", raising=False)
    monkeypatch.setattr(module, "plot", lambda results, path: path.touch())
    for options, folder in (["--limit", "3"], "build"), ([], "build"), (["--record"], "tracked"):
        monkeypatch.setattr("sys.argv", [script, "questions.jsonl", *options])
        module.main()
        assert {file.name for file in (tmp_path / folder).glob(f"{script}.*")} >= {f"{script}.json", f"{script}.png"}
        assert (tmp_path / "tracked").exists() == (folder == "tracked")
