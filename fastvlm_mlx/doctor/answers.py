"""Asks the demo model the questions that the package ships with it."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fastvlm_mlx.checkpoint.released import DEMO, bundled_checkpoint
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.questions import Question, read_questions
from fastvlm_mlx.model.fastvlm import FastVLM

PART = "answers"


def shipped_questions() -> list[Question]:
    """The questions about the images in the package, with their right answers."""
    folder = bundled_checkpoint(DEMO)
    assert folder is not None
    return [row for row in read_questions(folder / "samples.jsonl") if isinstance(row, Question)]


def demo_answers(model: FastVLM, processor: FastVLMProcessor, questions: Sequence[Question]) -> Iterator[Check]:
    """Yields a check of every answer, image by image."""
    for _, about in groupby(questions, key=lambda row: row.image):
        rows = list(about)
        for row, answer in zip(rows, evaluate(model, processor, rows).answers, strict=True):
            yield Check(
                part=PART,
                name=f"{Path(row.image).name}: {row.question}",
                value=answer.prediction if answer.prediction is not None else str(answer.error),
                reason=f"right is: {' or '.join(row.answers)}",
                ok=answer.score == 1,
            )
