"""Brings together what words and what asking find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from fastvlm_mlx.album.asking import probability
from fastvlm_mlx.album.index import Index
from fastvlm_mlx.album.words import all_of, any_of, phrase, terms

_PHRASE, _ALL, _SOME = 2.0, 1.0, -1.0
"""What it adds to the logarithm of the odds that a text has the query's words: one after the other, all, or some."""


class Match(NamedTuple):
    """What words say about a picture.

    Attributes:
        share: Of the query's words, those that its texts or its path have.
        weight: What that adds to the logarithm of the odds that the picture is what was looked for.
    """

    share: float
    weight: float


def matches(index: Index, query: str) -> dict[int, Match]:
    """The pictures whose texts or paths have words of a query, those with the most first."""
    words = terms(query)
    if not words:
        return {}
    together = {number for number, _ in index.matching(phrase(words))}
    complete = {number for number, _ in index.matching(all_of(words))}
    some = [number for number, _ in index.matching(any_of(words))]
    found = {
        number: Match(1.0, _PHRASE) if number in together else Match(1.0, _ALL) if number in complete else _PARTIAL
        for number in some
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].weight))


_PARTIAL = Match(0.5, _SOME)


def rank(
    found: Mapping[int, Match], odds: Mapping[int, float], *, asked_only: bool = False
) -> Iterator[tuple[int, float]]:
    """The pictures with their scores, best first.

    Args:
        found: What words say.
        odds: What asking says: the logarithm of the odds of yes against no.
        asked_only: Whether to leave out those that were not asked about.
    """
    numbers = odds if asked_only else {**odds, **found}
    logarithms = {number: _logarithm(found.get(number), odds.get(number)) for number in numbers}
    for number, value in sorted(logarithms.items(), key=lambda item: (-item[1], item[0])):
        yield number, probability(value)


def _logarithm(match: Match | None, odds: float | None) -> float:
    return (0.0 if match is None else match.weight) + (0.0 if odds is None else odds)
