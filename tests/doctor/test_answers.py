"""Answers to questions are right or named."""

from pathlib import Path

from fastvlm_mlx import generate
from fastvlm_mlx.doctor.answers import demo_answers, shipped_questions
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.questions import Question
from fastvlm_mlx.model.fastvlm import FastVLM
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
    assert (wrong.ok, wrong.name, wrong.reason) == (False, "square.png: What?", "right is: something else or or this")
    assert unread.ok is False
    assert "missing.png" in str(unread.value)


def test_the_shipped_questions_are_about_six_images() -> None:
    questions = shipped_questions()
    assert len({row.image for row in questions}) == 6
    assert all(row.image.is_file() for row in questions)
