"""Brings together what words and what asking say about the pictures of an album.

Words are evidence, and not only for a picture that has them: where some pictures' captions have the query's words, it
counts against a picture that its caption lacks them. And they tell how far asking can be trusted. If the model says yes
to most pictures, and as surely to those without the words as to those with them, it does not know what the query means;
its answers then count for less. `benchmarks/search.py` measures what comes of that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fastvlm_mlx.album.asking import probability
from fastvlm_mlx.album.index import Index
from fastvlm_mlx.album.words import any_of, phrase, terms

_HAS, _LACKS = 2.0, -1.0
"""What it adds to the logarithm of the odds that a picture has the words of the query, or lacks them."""
_FIRST = 0.25
"""What it adds to be the best match by words, and less for those that follow."""
_ALONE = 3.0
"""The logarithm of the odds, for or against, that words give where asking is worth nothing."""
_MOST_ODDS = 3.0
"""The logarithm of the odds beyond which an answer is not believed to be surer, where there are words as well."""
_TRUST = 0.5
"""Asking is trusted as if so many pictures with the words had shown that it can be, besides those that are there."""
_WORDS_ONLY = {"phrase": 2.0, "all": 1.0, "some": -1.0}
"""The logarithm of the odds of a picture that was not asked about."""


class Match(NamedTuple):
    """What words say about a picture.

    Attributes:
        share: Of the query's words that are in any of the album's texts, those that this one has.
        level: `phrase` if it has them one after the other, `all`, or `some`.
    """

    share: float
    level: str


def matches(index: Index, query: str) -> dict[int, Match]:
    """The pictures whose texts or paths have words of a query, those with the most first.

    Words that no text of the album has tell nothing.
    """
    having = {word: {number for number, _ in index.matching(any_of([word]))} for word in terms(query)}
    words = [word for word, numbers in having.items() if numbers]
    if not words:
        return {}
    together = {number for number, _ in index.matching(phrase(words))} if len(words) > 1 else having[words[0]]
    some = [number for number, _ in index.matching(any_of(words))]
    found = {}
    for number in some:
        share = sum(number in having[word] for word in words) / len(words)
        level = "phrase" if number in together else "all" if share == 1 else "some"
        found[number] = Match(share, level)
    return dict(sorted(found.items(), key=lambda item: (-_WORDS_ONLY[item[1].level], -item[1].share)))


def rank(found: Mapping[int, Match], odds: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """The pictures with their scores, best first.

    Args:
        found: What words say, from `matches`.
        odds: What asking says: the logarithm of the odds of yes against no.
    """
    having = {number for number, match in found.items() if match.level == "phrase"}
    complete = {number for number, match in found.items() if match.level == "all"}
    full, partial = (having, complete) if having else (complete, set())
    trust = _trust(full, odds)
    values = {}
    for number in {**odds, **found}:
        if number not in odds:
            values[number] = _WORDS_ONLY[found[number].level]
        elif not full:
            values[number] = odds[number]
        else:
            answer = _MOST_ODDS * math.tanh(odds[number] / _MOST_ODDS)
            if number in partial:
                values[number] = trust * answer
            else:
                sign = 1 if number in full else -1
                values[number] = trust * answer + (1 - trust) * sign * _ALONE + (_HAS if number in full else _LACKS)
    order = {number: place for place, number in enumerate(found)}
    for number in full & values.keys():
        values[number] += _FIRST * (1 - order[number] / len(full))
    for number, value in sorted(values.items(), key=lambda item: (-item[1], order.get(item[0], len(order)), item[0])):
        yield number, probability(value)


def _trust(full: Collection[int], odds: Mapping[int, float]) -> float:
    """How far asking can be trusted, from 0 to 1.

    It cannot be if it says yes to the pictures without the words, and does not tell those with the words from them: if
    the probability that it is surer of one with the words than of one without is about ½. Few pictures with the words
    change little.
    """
    numbers = list(odds)
    has = np.array([number in full for number in numbers], dtype=bool)
    count, others = int(has.sum()), int((~has).sum())
    if not count or not others:
        return 1.0
    values = np.array([odds[number] for number in numbers])
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[places]
    area = (ranks[has].sum() - count * (count + 1) / 2) / (count * others)
    tells = (max(0.0, 2 * area - 1) * count + _TRUST) / (count + _TRUST)
    return float(1 - (1 - tells) * (values[~has] > 0).mean())
