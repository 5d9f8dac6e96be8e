"""Evaluates a model on a question file, for `fastvlm eval` and to judge quantization."""

import io
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.arguments import check_callable, check_kind, choice, items, whole
from fastvlm_mlx.backend import device
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.metrics import METRICS
from fastvlm_mlx.jobs.predictions import Prediction, Predictions
from fastvlm_mlx.jobs.questions import MALFORMED, BadRow, Question, sample
from fastvlm_mlx.jobs.scores import Answer, EvaluationReport
from fastvlm_mlx.model.fastvlm import FastVLM

Progress = Callable[[int, int], None]
"""Called with the number of answered questions and of all questions."""

_LIBRARIES = ("mlx", "pillow", "pi-heif", "tokenizers")
ANSWER_TOKENS = 64
"""Default length of the longest answer."""


def prediction_settings(
    model: FastVLM, checkpoint: str, *, resolution: Resolution = None, max_tokens: int = ANSWER_TOKENS
) -> dict[str, Any]:
    """Returns what all predictions of a model depend on, for `Predictions`.

    Args:
        model: From `load`.
        checkpoint: The `checkpoint_fingerprint` of the folder that it was loaded from.
        resolution: As in `evaluate`.
        max_tokens: As in `evaluate`.
    """
    return {
        "checkpoint": checkpoint,
        "dtype": str(model.dtype),
        "device": device(),
        "versions": {"fastvlm-mlx": __version__} | {name: version(name) for name in _LIBRARIES},
        "resolution": resolution,
        "max_tokens": max_tokens,
    }


def evaluate(
    model: FastVLM,
    processor: FastVLMProcessor,
    questions: Sequence[Question | BadRow],
    *,
    metric: str = "exact",
    limit: int | None = None,
    resolution: Resolution = None,
    max_tokens: int = ANSWER_TOKENS,
    predictions: Predictions | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Asks a model all questions and returns the scores of its greedy answers.

    Several questions are asked at a time, each answered as it would be alone. A row scores 0 if it is malformed, its
    image cannot be read or its question does not fit. The report names it, and the evaluation continues with the next
    row.

    Args:
        model: From `load`.
        processor: From `load`.
        questions: From `read_questions`.
        metric: One of `METRICS`.
        limit: Ask a `sample` of at most this many rows.
        resolution: Side in pixels that images are resized to; None for the model's own.
        max_tokens: Longest answer.
        predictions: Where answers are kept, and where answers of earlier runs come from; with the
            `prediction_settings` of this model, resolution and length.
        progress: Called at the beginning, after each question that was asked, and at the end.

    Raises:
        ConfigError: If the metric is unknown, there are no questions, or the model cannot run at the resolution.
        CheckpointError: If the model's files are damaged.
    """
    choice(metric, "metric", METRICS)
    rows: list[Question | BadRow] = items(questions, "questions", "rows from read_questions")
    for row in rows:
        check_kind(row, "each of the questions", (Question, BadRow), "a row from read_questions")
    if predictions is not None:
        check_kind(predictions, "predictions", Predictions, "Predictions or None")
    check_callable(progress, "progress")
    config = GenerationConfig(max_tokens=ANSWER_TOKENS if max_tokens is None else max_tokens)
    if limit is not None:
        rows = sample(rows, whole(limit, "limit"))
    if not rows:
        raise ConfigError("there are no questions to evaluate")
    answers: dict[int, Answer] = {}
    asked: dict[Request, tuple[int, Question, Encoded]] = {}

    def requests() -> Iterator[Request]:
        """The questions that have no answer yet; answers the others."""
        images = _Images()
        for number, row in enumerate(rows):
            if isinstance(row, BadRow):
                answers[number] = Answer(line=row.line, kind=MALFORMED, score=0.0, error=row.reason)
                continue
            try:
                image = images.read(row.image)
            except FastVLMError as err:
                answers[number] = _failed(row, err)
                continue
            known = predictions.get(row.question, image.data) if predictions else None
            if known is not None:
                answers[number] = _scored(row, known, metric, kept=True)
                continue
            request = Request(
                image=_as_file(image),
                prompt=row.question,
                resolution=resolution,
                config=config,
            )
            asked[request] = number, row, image
            yield request

    if progress:
        progress(0, len(rows))
    with Engine(model, processor) as engine:
        for handle in engine.map(requests()):
            number, row, image = asked.pop(handle.request)
            try:
                prediction = Prediction.of(handle.result())
            except (ConfigError, CheckpointError):
                raise  # no other row would fare better
            except FastVLMError as err:
                answers[number] = _failed(row, err)
            else:
                if predictions:
                    predictions.add(row.question, image.data, prediction)
                answers[number] = _scored(row, prediction, metric, kept=False)
            if progress:
                progress(len(answers), len(rows))
    if progress:
        progress(len(rows), len(rows))
    return EvaluationReport(metric=metric, answers=tuple(answers[number] for number in range(len(rows))))


def _failed(row: Question, error: FastVLMError) -> Answer:
    return Answer(line=row.line, kind=row.kind, score=0.0, error=str(error))


def _scored(row: Question, prediction: Prediction, metric: str, *, kept: bool) -> Answer:
    return Answer(
        line=row.line,
        kind=row.kind,
        prediction=prediction.text,
        score=METRICS[metric](prediction.text, row.answers),
        tokens=prediction.generated_tokens,
        kept=kept,
    )


class _Images:
    """Reads encoded images; the latest stays in memory for the next question about it."""

    def __init__(self) -> None:
        self._source: Path | str | None = None
        self._latest: Encoded | None = None

    def read(self, source: Path | str) -> Encoded:
        if self._latest is None or source != self._source:
            self._latest = read(source)
            self._source = source
        return self._latest


def _as_file(image: Encoded) -> io.BytesIO:
    """The very bytes that a prediction is kept for, under the name that messages give."""
    file = io.BytesIO(image.data)
    file.name = image.name
    return file
