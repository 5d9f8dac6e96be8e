"""Accuracy on a file of questions: what `fastvlm eval` runs and what quantization is judged by."""

from collections.abc import Callable, Sequence

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
"""Called with the questions answered and the questions in all."""
ANSWER_TOKENS = 64


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
    """The scores of a model's greedy answers.

    A row that is malformed, whose image cannot be read or whose question does not fit scores 0 and is named in the
    report; the others go on.

    Args:
        model: From `load`.
        processor: From `load`.
        questions: From `read_questions`.
        metric: One of `METRICS`.
        limit: Take only this many rows, a `sample`.
        resolution: Side in pixels that images are resized to; None for the model's own.
        max_tokens: Longest answer.
        predictions: Where answers are kept and taken from.
        progress: Told how far it is.

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
