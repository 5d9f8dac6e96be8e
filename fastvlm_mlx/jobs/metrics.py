"""Metrics that score a predicted text against the right answers."""

import math
import re
import unicodedata
from collections.abc import Sequence
from types import MappingProxyType

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def normalize(text: str) -> str:
    """Returns a text as answers are compared: without case, punctuation and articles, number words as digits."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    unpunctuated = "".join(
        character if not unicodedata.category(character).startswith("P") or _inside_number(text, i) else " "
        for i, character in enumerate(text)
    )
    words = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in unpunctuated.split()]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _inside_number(text: str, i: int) -> bool:
    """Whether the punctuation at `i` is a sign, a decimal point or a per cent sign."""
    before, after = text[i - 1 : i].isdigit(), text[i + 1 : i + 2].isdigit()
    return (text[i] == "." and before and after) or (text[i] == "-" and after and not text[i - 1 : i].isalnum())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the normalized prediction is one of the normalized answers, else 0."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns VQA's accuracy (Antol et al. 2015): min(1, matches / 3), averaged over leaving each annotator out.

    It is meant for answers of several people; with fewer than four, one match is enough.
    """
    normalized = normalize(prediction)
    matches = [normalize(answer) == normalized for answer in answers]
    if len(answers) < 4:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(answers)


def relaxed_numeric(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if a number is within 5 % of an answer (Methani et al. 2020, as in ChartQA), else `exact_match`."""
    value = _number(prediction)
    for answer in answers:
        target = _number(answer)
        if value is not None and target is not None and abs(value - target) <= 0.05 * abs(target):
            return 1.0
    return exact_match(prediction, answers)


def _number(text: str) -> float | None:
    """Parses a number with or without a unit sign; None for other texts."""
    try:
        value = float(normalize(text).strip(" %$€£¥"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Returns the normalized Levenshtein similarity to the closest answer, 0 below one half (Biten et al. 2019).

    Only case and spaces are normalized, since the metric is meant for reading text.
    """
    best = 0.0
    predicted = " ".join(prediction.casefold().split())
    for answer in answers:
        expected = " ".join(answer.casefold().split())
        length = max(len(predicted), len(expected))
        best = max(best, 1.0 - _edits(predicted, expected) / length if length else 1.0)
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
"""By name; each takes a prediction and the right answers and returns a score between 0 and 1."""
