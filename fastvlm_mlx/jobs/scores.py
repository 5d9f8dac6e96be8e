"""Scores of a model on a question file with their intervals, and the comparison of two models."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.intervals import of_mean, wilson
from fastvlm_mlx.jobs.metrics import normalize
from fastvlm_mlx.jobs.questions import BadRow, Question


@dataclass(frozen=True, kw_only=True)
class Share:
    """A mean score over `count` questions with its 95 % Wilson interval."""

    count: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Share":
        """Returns the share of at least one score, all between 0 and 1."""
        score = sum(scores) / len(scores)
        low, high = wilson(score, len(scores))
        return cls(count=len(scores), score=score, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The outcome for one row: a prediction and its score, or an error and the score 0.

    Attributes:
        line: Of the row, from 1.
        kind: Of the question.
        prediction: The model's answer.
        score: Between 0 and 1.
        error: Why there is no prediction.
        tokens: Number of tokens of the prediction.
        kept: Whether the prediction comes from an earlier run.
    """

    line: int
    kind: str
    prediction: str | None = None
    score: float
    error: str | None = None
    tokens: int | None = None
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against a baseline on the same questions.

    Attributes:
        agreement: Share of the questions that both answer in the same way, whether right or wrong.
        difference: Mean score of the model minus that of the baseline.
        low: Lower end of the 95 % interval of `difference`, from the paired differences.
        high: Its upper end.
        won: Questions on which the model scores higher.
        lost: Questions on which it scores lower.
    """

    agreement: Share
    difference: float
    low: float
    high: float
    won: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The scores of a model on a question file."""

    metric: str
    answers: tuple[Answer, ...] = field(repr=False)

    @property
    def failed(self) -> tuple[Answer, ...]:
        """The rows without a prediction."""
        return tuple(answer for answer in self.answers if answer.error is not None)

    @property
    def kept(self) -> int:
        """How many predictions come from an earlier run."""
        return sum(answer.kept for answer in self.answers)

    @property
    def total(self) -> Share:
        """The share over all rows; failed ones count as 0."""
        return Share.of([answer.score for answer in self.answers])

    @property
    def kinds(self) -> dict[str, Share]:
        """The share of each kind, in the order of the file."""
        scores: dict[str, list[float]] = {}
        for answer in self.answers:
            scores.setdefault(answer.kind, []).append(answer.score)
        return {kind: Share.of(values) for kind, values in scores.items()}

    def against(self, baseline: "EvaluationReport") -> Comparison:
        """Compares this model with another one on the same rows.

        Raises:
            ConfigError: If the reports are about different rows or metrics.
        """
        rows = [(answer.line, answer.kind) for answer in self.answers]
        if self.metric != baseline.metric or rows != [(answer.line, answer.kind) for answer in baseline.answers]:
            raise ConfigError("two evaluations can be compared only on the same questions and metric")
        pairs = list(zip(self.answers, baseline.answers, strict=True))
        differences = [mine.score - theirs.score for mine, theirs in pairs]
        low, high = of_mean(differences)
        return Comparison(
            agreement=Share.of([float(_alike(mine, theirs)) for mine, theirs in pairs]),
            difference=sum(differences) / len(differences),
            low=low,
            high=high,
            won=sum(d > 0 for d in differences),
            lost=sum(d < 0 for d in differences),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object with `metric`, `total`, `kinds`, `from_cache` and `failed`."""
        return {
            "metric": self.metric,
            "total": asdict(self.total),
            "kinds": {kind: asdict(share) for kind, share in self.kinds.items()},
            "from_cache": self.kept,
            "failed": [{"line": answer.line, "error": answer.error} for answer in self.failed],
        }

    def table(self) -> list[tuple[str, str, str, str]]:
        """Returns rows of text, the total last: kind, number of questions, score and 95 % interval in per cent."""
        return [
            (kind, str(share.count), f"{100 * share.score:.1f}", f"{100 * share.low:.1f} to {100 * share.high:.1f}")
            for kind, share in [*self.kinds.items(), ("all", self.total)]
        ]

    def records(self, questions: Sequence[Question | BadRow]) -> Iterator[dict[str, Any]]:
        """Yields a JSON object for each row: what was asked, what was answered and what it scored.

        Args:
            questions: From `read_questions`; those that were not asked are left out.
        """
        rows = {row.line: row for row in questions}
        for answer in self.answers:
            row = rows[answer.line]
            question = row if isinstance(row, Question) else None
            yield {
                "line": answer.line,
                "image": str(question.image) if question else None,
                "question": question.question if question else None,
                "kind": answer.kind,
                "answers": list(question.answers) if question else [],
                "prediction": answer.prediction,
                "score": answer.score,
                "tokens": answer.tokens,
                "from_cache": answer.kept,
                "error": answer.error,
            }


def _alike(a: Answer, b: Answer) -> bool:
    if a.prediction is None or b.prediction is None:
        return a.prediction is b.prediction
    return normalize(a.prediction) == normalize(b.prediction)
