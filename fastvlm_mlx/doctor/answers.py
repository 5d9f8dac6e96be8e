"""Asks the demo model the questions that the package ships with it, and looks closer where an answer is wrong."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.released import DEMO, bundled_checkpoint
from fastvlm_mlx.doctor.agreement import allowed_whole, relative_error, values
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import cpu_segments, on_cpu
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.evaluate import ANSWER_TOKENS, evaluate
from fastvlm_mlx.jobs.questions import Question, read_questions
from fastvlm_mlx.model.fastvlm import FastVLM

PART = "answers"


def shipped_questions() -> list[Question]:
    """The questions about the images in the package, with their right answers."""
    folder = bundled_checkpoint(DEMO)
    assert folder is not None
    return [row for row in read_questions(folder / "samples.jsonl") if isinstance(row, Question)]


def demo_answers(
    model: FastVLM,
    processor: FastVLMProcessor,
    questions: Sequence[Question],
    reference: Callable[[], FastVLM] | None = None,
) -> Iterator[Check]:
    """Yields a check of every answer, image by image.

    The reason of a wrong one says what the model answers to this question alone, how sure it is of that, and how far
    its visual tokens are from the CPU's: that tells wrong arithmetic from results that differ from time to time.

    Args:
        model: As a user runs it.
        processor: Of the model.
        questions: Those about one image follow one another.
        reference: Returns the model in float32, for the CPU; without it, visual tokens are not compared.
    """
    for image, about in groupby(questions, key=lambda row: row.image):
        rows = list(about)
        seen = ""
        for row, answer in zip(rows, evaluate(model, processor, rows).answers, strict=True):
            reason = f"right is: {' or '.join(row.answers)}"
            if answer.score != 1 and answer.prediction is not None:
                seen = seen or (_seen(model, reference(), processor, image) if reference else "")
                reason += f"; {_asked_alone(model, processor, row)}{seen}"
            yield Check(
                part=PART,
                name=f"{Path(row.image).name}: {row.question}",
                value=answer.prediction if answer.prediction is not None else str(answer.error),
                reason=reason,
                ok=answer.score == 1,
            )


def _asked_alone(model: FastVLM, processor: FastVLMProcessor, row: Question) -> str:
    """What the model answers now, to this question alone, and its lead over other tokens where that is least."""
    answer = generate(
        model, processor, image=row.image, prompt=row.question, max_tokens=ANSWER_TOKENS, temperature=0.0, logprobs=2
    )
    leads = [token.top[0][1] - token.top[1][1] for token in answer.logprobs]
    sure = f", which leads by {min(leads):.2g} nats or more" if leads else ""
    return f"asked alone: {answer.text}{sure}"


def _seen(model: FastVLM, reference: FastVLM, processor: FastVLMProcessor, image: Path | str) -> str:
    """How far the visual tokens of an image are from the CPU's."""
    pixels = processor.prepare_images([image])
    with on_cpu():
        expected = mx.array(pixels).astype(mx.float32) / 255
        for run in cpu_segments(reference).values():
            expected = run(expected)
        mx.eval(expected)
    limit, _ = allowed_whole(str(model.dtype).removeprefix("mlx.core."))
    error = relative_error(values(model.encode_image(pixels)), values(expected))
    return f"; its visual tokens, computed again, are off by {error:.2g} from the CPU's, {limit:.2g} is allowed"
