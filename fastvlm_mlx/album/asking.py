"""Asks the model whether pictures show something: the exact probability of yes against no, from visual tokens.

The vision tower has no part in it. The answers that count are whole ones, in the language of the question and in the
spelling that the model prefers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.album.words import is_unspaced
from fastvlm_mlx.engine.image_scores import ImageScorer
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import IM_END
from fastvlm_mlx.model.fastvlm import FastVLM

PLACE = "{}"
"""Of the query in a question."""
ENGLISH = "Is there {} in the picture?"
CHINESE = "图片里有{}吗?"
LONGEST_QUERY = 1000
"""Characters of the longest query."""
POSITIONS = 1024
"""About so many positions are computed at once."""
MOST_IMAGES = 32
_SPELLINGS = (("yes", "no"), ("Yes", "No"))
_CHINESE_SPELLINGS = (("有", "没有"), ("是", "不是"), ("是", "否"))


class Question(NamedTuple):
    """A question about a picture, and what says yes and no to it.

    Attributes:
        text: The question.
        yes: The answer that means yes.
        no: The answer that means no.
    """

    text: str
    yes: str
    no: str


def check_query(query: str) -> str:
    """A query without the spaces around it.

    Raises:
        PromptError: If there is nothing in it, or too much.
    """
    query = " ".join(query.split())
    if not query:
        raise PromptError("the query is empty; say what the pictures should show, such as 'a red car'")
    if len(query) > LONGEST_QUERY:
        raise PromptError(
            f"the query has {len(query)} characters ({printable(query, 40)}); the most are {LONGEST_QUERY}"
        )
    return query


def check_template(template: str) -> str:
    """A question in which braces, once, are the place of the query.

    Raises:
        PromptError: If it is none.
    """
    if template.count(PLACE) != 1 or not template.replace(PLACE, "").strip():
        raise PromptError(f"a question must have {PLACE} once, where the query goes, not {printable(template, 60)}")
    return template


class Asker:
    """Asks one model about pictures whose visual tokens are known. Several threads may use one.

    Args:
        model: From `load`.
        processor: From `load`.
        form: See `fastvlm_mlx.album.updating.Form`: what the visual tokens have to be made with.
        template: The question, with `{}` for the query; None for the default in the query's language.
        batch: Pictures at a time; None for what suits.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: FastVLMProcessor,
        form: str,
        *,
        template: str | None = None,
        batch: int | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.form = form
        self._template = None if template is None else check_template(template)
        self._batch = batch

    def question(self, query: str) -> Question:
        """The question about a query."""
        template = self._template or (CHINESE if is_unspaced(query) else ENGLISH)
        text = template.replace(PLACE, query)
        spellings: Sequence[tuple[str, str]] = _SPELLINGS
        if is_unspaced(text):
            spellings = _CHINESE_SPELLINGS[:1] if "有" in template else _CHINESE_SPELLINGS[1:]
        return Question(text, *self._preferred(text, spellings))

    def _preferred(self, text: str, spellings: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """The spelling of yes and no that the model gives the most probability before it has seen a picture."""
        if len(spellings) == 1:
            return spellings[0]
        ids = self.processor.encode(text)
        logits, _ = self.model.prefill(ids)
        values = np.array(logits[0], dtype=np.float64)
        values -= values.max()

        def weight(pair: tuple[str, str]) -> float:
            return sum(math.exp(values[self.processor.tokenizer.encode(word)[0]]) for word in pair)

        return max(spellings, key=weight)

    def begin(self, question: Question) -> Asking:
        """What asks a question about one batch of pictures after another."""
        return Asking(self, question, self._batch)


class Asking:
    """One question on its way through an album.

    Args:
        asker: Asks.
        question: The question.
        batch: Pictures at a time; None for what suits.
    """

    def __init__(self, asker: Asker, question: Question, batch: int | None) -> None:
        processor = asker.processor
        self._ids = processor.encode(question.text, 1)
        end = processor.tokenizer.token_id(IM_END)
        choices = [[*processor.tokenizer.encode(word), end] for word in (question.yes, question.no)]
        self._scorer = ImageScorer(asker.model, self._ids, choices)
        self._given = batch

    def batch(self, visual_tokens: int) -> int:
        """How many pictures of so many visual tokens are asked about at a time."""
        if self._given is not None:
            return self._given
        return max(1, min(MOST_IMAGES, POSITIONS // (visual_tokens + len(self._ids))))

    def __call__(self, visual_tokens: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """The logarithm (B,) of the odds of yes against no for each picture, of visual tokens (N, D) each.

        Raises:
            CheckpointError: If the model computes no numbers.
        """
        scores = self._scorer(np.stack(visual_tokens))
        odds: NDArray[np.float64] = scores[:, 0] - scores[:, 1]
        return odds


def probability(odds: float) -> float:
    """The probability whose odds have this logarithm."""
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
