"""Evaluates a model on a question file, for `fastvlm eval` and to judge quantization."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.inputs.images import Resolution
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.jobs.journal import Predictions
from fastvlm_mlx.jobs.metrics import METRICS
from fastvlm_mlx.jobs.questions import MALFORMED, BadRow, Question, sample
from fastvlm_mlx.jobs.scores import Answer, EvaluationReport
from fastvlm_mlx.model.fastvlm import FastVLM

Progress = Callable[[int, int], None]
"""Called with the number of answered questions and of all questions."""

ANSWER_TOKENS = 64
"""Default length of the longest answer."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the predictions for a question file depend on.

    Attributes:
        weights: The source of the checkpoint, as its config says.
        quantization: The entry of its config.json; None for floating point.
        dtype: What it computes in.
        resolution: As in `evaluate`.
        max_tokens: As in `evaluate`.
        data: SHA-256 of the question file.
    """

    weights: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    dtype: str
    resolution: Resolution
    max_tokens: int
    data: str

    @classmethod
    def of(cls, model: FastVLM, data: Path, *, resolution: Resolution, max_tokens: int) -> "EvaluationSettings":
        """Returns the settings for a loaded model and the question file `data`."""
        quantization = model.config.quantization
        return cls(
            weights=model.config.source,
            quantization=quantization.to_dict() if quantization else None,
            dtype=str(model.dtype),
            resolution=resolution,
            max_tokens=max_tokens,
            data=hashlib.sha256(data.read_bytes()).hexdigest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object, the header of the predictions."""
        return asdict(self)

    def file_name(self, model: str) -> str:
        """Returns the name of the file for the predictions of a model that the user calls `model`."""
        identity = json.dumps([model, self.to_dict()], sort_keys=True, default=str)
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"


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

    A row scores 0 if it is malformed, its image cannot be read or its question does not fit. The report names it, and
    the evaluation continues with the next row.

    Args:
        model: From `load`.
        processor: From `load`.
        questions: From `read_questions`.
        metric: One of `METRICS`.
        limit: Ask only a `sample` of this many rows.
        resolution: Side in pixels that images are resized to; None for the model's own.
        max_tokens: Longest answer.
        predictions: Where answers are stored, and where known answers come from.
        progress: Called before each question and at the end.

    Raises:
        ConfigError: If the metric is unknown or there are no questions.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    rows = questions if limit is None else sample(questions, limit)
    if not rows:
        raise ConfigError("there are no questions to evaluate")
    answers, prefix_cache = [], PrefixCache()
    for done, row in enumerate(rows):
        if progress:
            progress(done, len(rows))
        if isinstance(row, BadRow):
            answers.append(Answer(line=row.line, kind=MALFORMED, prediction=None, score=0.0, error=row.reason))
            continue
        try:
            prediction = predictions.get(row) if predictions else None
            if prediction is None:
                result = generate(
                    model,
                    processor,
                    image=row.image,
                    prompt=row.question,
                    resolution=resolution,
                    max_tokens=max_tokens,
                    prefix_cache=prefix_cache,
                )
                prediction = result.text
                if predictions:
                    predictions.add(row, prediction)
        except FastVLMError as err:
            answers.append(Answer(line=row.line, kind=row.kind, prediction=None, score=0.0, error=str(err)))
            continue
        score = METRICS[metric](prediction, row.answers)
        answers.append(Answer(line=row.line, kind=row.kind, prediction=prediction, score=score))
    if progress:
        progress(len(rows), len(rows))
    return EvaluationReport(metric=metric, answers=tuple(answers))
