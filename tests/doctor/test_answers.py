"""Answers to questions are right or named."""

import re
from pathlib import Path

from fastvlm_mlx import generate
from fastvlm_mlx.backend import mx
from fastvlm_mlx.doctor.answers import demo_answers, shipped_questions
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import twin
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.questions import Question
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "square.png"


def test_a_wrong_answer_is_named(loaded: tuple[FastVLM, FastVLMProcessor]) -> None:
    text = generate(*loaded, image=IMAGE, prompt="What?", max_tokens=64).text
    rows = [
        Question(line=1, image=IMAGE, question="What?", answers=(text,)),
        Question(line=2, image=IMAGE, question="What?", answers=("something else", "or this")),
        Question(line=3, image=Path("missing.png"), question="What?", answers=(text,)),
    ]
    right, wrong, unread = demo_answers(*loaded, rows)
    assert (right.ok, right.value) == (True, text)
    assert (wrong.ok, wrong.name) == (False, "square.png: What?")
    assert wrong.reason.startswith(f"right is: something else or or this; asked alone: {text}, which leads by ")
    assert unread.ok is False
    assert "missing.png" in str(unread.value)


def test_the_reason_of_a_wrong_answer_tells_whether_the_model_sees_what_the_cpu_sees(
    loaded: tuple[FastVLM, FastVLMProcessor],
) -> None:
    model, processor = loaded
    rows = [Question(line=1, image=IMAGE, question="What?", answers=("something else",))]
    (right,) = demo_answers(model, processor, rows, lambda: twin(model, mx.float32))
    assert _error(right) < 1e-4
    blind = twin(model, mx.float32)
    with turn():
        blind.vision_tower.conv_exp.conv.weight *= 1.5
        mx.eval(blind.parameters())
    (wrong,) = demo_answers(blind, processor, rows, lambda: twin(model, mx.float32))
    assert _error(wrong) > 1e-2


def _error(check: Check) -> float:
    found = re.search(
        r"; its visual tokens, computed again, are off by (\S+) from the CPU's, 0.0008 is allowed", check.reason
    )
    assert found is not None
    return float(found[1])


def test_the_shipped_questions_are_about_six_images() -> None:
    questions = shipped_questions()
    assert len({row.image for row in questions}) == 6
    assert all(row.image.is_file() for row in questions)
