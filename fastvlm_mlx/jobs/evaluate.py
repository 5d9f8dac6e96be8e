"""Accuracy on a file of questions: what `fastvlm eval` runs and what quantization is judged by.

A question file is JSON Lines: `{"image": "photos/1.jpg", "question": "…", "answers": ["…"], "kind": "count"}`. Image
paths count from the file's folder; `answers` holds every text that is right; `kind` groups the results and may be left
out.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, TextIO

from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.inputs.processor import FastVLMProcessor, Resolution
from fastvlm_mlx.model.fastvlm import FastVLM

Progress = Callable[[int, int], None]
"""Called with the questions answered and the questions in all."""
OTHER = "other"
"""Kind of a question that names none."""
MALFORMED = "malformed"
"""Kind of a row that is no question."""
ANSWER_TOKENS = 64
Z95 = 1.959964
"""Half-width of a 95 % interval in standard deviations."""


# Metrics

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def normalize(text: str) -> str:
    """A text as answers are compared: case, punctuation, articles and the way numbers are written do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    kept = "".join(
        character if not unicodedata.category(character).startswith("P") or _inside_number(text, i) else " "
        for i, character in enumerate(text)
    )
    words = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in kept.split()]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _inside_number(text: str, i: int) -> bool:
    """Whether the punctuation at `i` is a sign, a decimal point or a per cent sign."""
    before, after = text[i - 1 : i].isdigit(), text[i + 1 : i + 2].isdigit()
    return (text[i] == "." and before and after) or (text[i] == "-" and after and not text[i - 1 : i].isalnum())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalized prediction is one of the normalized answers, else 0."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy (Antol et al. 2015): min(1, matches / 3), averaged over leaving out each annotator in turn.

    It needs several people's answers; with fewer than four, one match is enough.
    """
    wanted = normalize(prediction)
    matches = [normalize(answer) == wanted for answer in answers]
    if len(answers) < 4:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(answers)


def relaxed_numeric(prediction: str, answers: Sequence[str]) -> float:
    """1 if a number is within 5 % of an answer's (Methani et al. 2020, as in ChartQA); other texts as `exact_match`."""
    value = _number(prediction)
    for answer in answers:
        target = _number(answer)
        if value is not None and target is not None and abs(value - target) <= 0.05 * abs(target):
            return 1.0
    return exact_match(prediction, answers)


def _number(text: str) -> float | None:
    """The number that a text is, without unit signs; None if it is not one."""
    try:
        value = float(normalize(text).strip(" %$€£¥"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalized Levenshtein similarity to the closest answer, 0 below one half (Biten et al. 2019).

    Only case and spaces are normalized, since it is meant for reading text.
    """
    best = 0.0
    given = " ".join(prediction.casefold().split())
    for answer in answers:
        wanted = " ".join(answer.casefold().split())
        longer = max(len(given), len(wanted))
        best = max(best, 1.0 - _edits(given, wanted) / longer if longer else 1.0)
    return best if best >= 0.5 else 0.0


def _edits(a: str, b: str) -> int:
    """The Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


METRICS = MappingProxyType(
    {"exact": exact_match, "vqa": vqa_accuracy, "relaxed": relaxed_numeric, "anls": anls},
)
"""Each takes a prediction and the answers that are right, and gives a score between 0 and 1."""


# Questions


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of a question file."""

    line: int
    image: Path
    question: str
    answers: tuple[str, ...]
    kind: str = OTHER

    @property
    def key(self) -> str:
        """What a stored prediction belongs to; another one once the image file is overwritten."""
        stat = self.image.stat() if self.image.is_file() else None
        version = (stat.st_size, stat.st_mtime_ns) if stat else None
        return hashlib.sha256(repr((str(self.image), version, self.question)).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is no question, and why."""

    line: int
    reason: str


def read_questions(path: Path) -> list[Question | BadRow]:
    """The rows of a question file in order, malformed ones as `BadRow`.

    Raises:
        ConfigError: If the file cannot be read or holds no rows.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read as a question file: {err}") from err
    rows = [_parse(path.parent, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path}: the question file is empty; expected one JSON object per line")
    return rows


def _parse(folder: Path, line: int, text: str) -> Question | BadRow:
    try:
        row = json.loads(text)
    except ValueError as err:
        return BadRow(line=line, reason=f"not valid JSON: {err}")
    if not isinstance(row, dict):
        return BadRow(line=line, reason=f"expected a JSON object, found {type(row).__name__}")
    for name in ("image", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return BadRow(line=line, reason=f'"{name}" must be a text that is not empty, found {row.get(name)!r}')
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return BadRow(line=line, reason=f'"answers" must be a list of texts, at least one, found {answers!r}')
    kind = row.get("kind", OTHER)
    if not isinstance(kind, str):
        return BadRow(line=line, reason=f'"kind" must be a text, found {kind!r}')
    return Question(line=line, image=folder / row["image"], question=row["question"], answers=tuple(answers), kind=kind)


# Results


@dataclass(frozen=True, kw_only=True)
class Share:
    """A mean score over `count` questions with its 95 % Wilson interval."""

    count: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Share":
        """The share of these scores, which lie between 0 and 1 and are at least one."""
        n = len(scores)
        p = sum(scores) / n
        spread = 1 + Z95**2 / n
        centre = (p + Z95**2 / (2 * n)) / spread
        half = Z95 / spread * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        # The score lies within its interval, whatever rounding makes of the ends at 0 and 1.
        return cls(count=n, score=p, low=min(p, max(0.0, centre - half)), high=max(p, min(1.0, centre + half)))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a row: a prediction and its score, or an error and the score 0."""

    line: int
    kind: str
    prediction: str | None
    score: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against a baseline on the same questions.

    Attributes:
        agreement: Share of the questions that both answer alike, whether right or wrong.
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
    def total(self) -> Share:
        """The share over all rows, failed ones counted with 0."""
        return Share.of([answer.score for answer in self.answers])

    @property
    def kinds(self) -> dict[str, Share]:
        """The share per kind, in the file's order."""
        scores: dict[str, list[float]] = {}
        for answer in self.answers:
            scores.setdefault(answer.kind, []).append(answer.score)
        return {kind: Share.of(values) for kind, values in scores.items()}

    def against(self, baseline: "EvaluationReport") -> Comparison:
        """This model compared with another one on the same rows.

        Raises:
            ConfigError: If the reports are about different rows or metrics.
        """
        rows = [(answer.line, answer.kind) for answer in self.answers]
        if self.metric != baseline.metric or rows != [(answer.line, answer.kind) for answer in baseline.answers]:
            raise ConfigError("two evaluations can be compared only on the same questions and metric")
        pairs = list(zip(self.answers, baseline.answers, strict=True))
        differences = [mine.score - theirs.score for mine, theirs in pairs]
        n = len(pairs)
        mean = sum(differences) / n
        half = Z95 * math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)
        return Comparison(
            agreement=Share.of([float(_alike(mine, theirs)) for mine, theirs in pairs]),
            difference=mean,
            low=mean - half,
            high=mean + half,
            won=sum(d > 0 for d in differences),
            lost=sum(d < 0 for d in differences),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON: `metric`, `total`, `kinds`, `failed`."""
        return {
            "metric": self.metric,
            "total": asdict(self.total),
            "kinds": {kind: asdict(share) for kind, share in self.kinds.items()},
            "failed": [{"line": answer.line, "error": answer.error} for answer in self.failed],
        }

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows of text for a table: kind, questions, score and its 95 % interval, both in per cent; the total last."""
        return [
            (kind, str(share.count), f"{100 * share.score:.1f}", f"{100 * share.low:.1f} to {100 * share.high:.1f}")
            for kind, share in [*self.kinds.items(), ("all", self.total)]
        ]


def _alike(a: Answer, b: Answer) -> bool:
    if a.prediction is None or b.prediction is None:
        return a.prediction is b.prediction
    return normalize(a.prediction) == normalize(b.prediction)


# Running


class Predictions:
    """Predictions kept in a JSON Lines file as they come, so that an interrupted evaluation goes on where it stopped.

    The first line says what the predictions depend on; a last line that was cut off is dropped.

    Args:
        path: The file; made if it does not exist.
        settings: What the predictions depend on, as JSON.

    Raises:
        ConfigError: If the file is not such a file, or was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._texts: dict[str, str] = {}
        header = json.dumps({"fastvlm_predictions": 1, **settings}, sort_keys=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[0] != header:
                raise ConfigError(
                    f"{path}: holds no predictions of this model with these settings; delete it or name another file\n"
                    f"  expected {header}\n  found    {lines[0][:200]}"
                )
            whole = lines[1:-1]
            self._texts = {row["key"]: row["prediction"] for row in map(json.loads, whole)}
            path.write_text("".join(f"{line}\n" for line in [header, *whole]), encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{header}\n", encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, question: Question) -> str | None:
        """The prediction kept for a question."""
        return self._texts.get(question.key)

    def add(self, question: Question, prediction: str) -> None:
        """Keeps a prediction, on disk before this returns."""
        self._texts[question.key] = prediction
        self._file.write(json.dumps({"key": question.key, "prediction": prediction}, ensure_ascii=False) + "\n")
        self._file.flush()


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
    answers = []
    for done, row in enumerate(rows):
        if progress:
            progress(done, len(rows))
        if isinstance(row, BadRow):
            answers.append(Answer(line=row.line, kind=_kind(row), prediction=None, score=0.0, error=row.reason))
            continue
        try:
            prediction = predictions.get(row) if predictions else None
            if prediction is None:
                result = generate(
                    model, processor, image=row.image, prompt=row.question, max_tokens=max_tokens, resolution=resolution
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


def _kind(row: Question | BadRow) -> str:
    return MALFORMED if isinstance(row, BadRow) else row.kind


def sample(rows: Sequence[Question | BadRow], limit: int) -> list[Question | BadRow]:
    """`limit` of the rows in the file's order: a random sample with each kind in proportion.

    It is the same every time, and part of every larger sample. Files are often sorted by kind, or cycle through the
    kinds, so rows at equal distances will not do.
    """
    sizes, seen = Counter(map(_kind, rows)), Counter[str]()
    random = Random(0)
    shuffled = sorted(range(len(rows)), key=lambda _: random.random())
    places = {}
    for i in shuffled:  # the n rows of a kind get the places (1/2)/n, (3/2)/n, … between 0 and 1
        kind = _kind(rows[i])
        places[i] = (seen[kind] + 0.5) / sizes[kind]
        seen[kind] += 1
    return [rows[i] for i in sorted(sorted(shuffled, key=places.__getitem__)[:limit])]
