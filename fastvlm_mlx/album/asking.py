"""Asks the model whether pictures show something: the exact probability of yes against no, from visual tokens.

The vision tower has no part in it. The answers that count are whole ones, in the language of the question and in the
spelling that the model prefers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.album.words import is_unspaced
from fastvlm_mlx.arguments import valid_text
from fastvlm_mlx.engine.image_scores import ImageScorer
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer_files import IM_END
from fastvlm_mlx.model.fastvlm import FastVLM

PLACE = "{}"
"""Of the query in a question."""
ENGLISH = ("Is there {} in the picture?", "Is there {} in the picture? Answer yes or no.")
CHINESE = ("图片里有{}吗?", "图片里有{}吗?请回答有或没有。")
LONGEST_QUERY = 1000
"""Characters of the longest query."""
POSITIONS = 1024
"""About so many positions are computed at once."""
MOST_IMAGES = 32
_USUAL_LENGTH = 32
"""Positions of a question, roughly."""
_PLAIN = 0.5
"""The probability of yes and no together from which on a question is plain enough."""
Spelling = tuple[str, str]
"""What says yes, and what says no."""
_YES_NO: tuple[Spelling, ...] = (("yes", "no"), ("Yes", "No"))
_YOU_MEI: tuple[Spelling, ...] = (("有", "没有"), ("是", "不是"), ("是", "否"))


def check_query(query: str) -> str:
    """A query without the spaces around it.

    Raises:
        PromptError: If there is nothing in it, or too much.
    """
    query = " ".join(valid_text(query, "the query").split())
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
        form: What the visual tokens have to be made with, see `fastvlm_mlx.album.updating.form_of`.
        template: The question, with `{}` for the query; None for a default in the query's language.
        batch: Pictures at a time; None for what suits.

    Attributes:
        hidden_size: D, of the visual tokens.

    Raises:
        PromptError: If the template is none.
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
        self.hidden_size = model.config.text_config.hidden_size
        self.given_batch = batch
        self._template = None if template is None else check_template(template)
        self._suited: dict[tuple[str, ...], tuple[str, Spelling]] = {}

    def templates(self, query: str) -> tuple[str, ...]:
        """The questions that may be asked, the shortest first."""
        if self._template is not None:
            return (self._template,)
        return CHINESE if is_unspaced(query) else ENGLISH

    def ask(self, query: str) -> Inquiry:
        """What asks about one batch of pictures after another."""
        return Inquiry(self, query)

    def suited(self, templates: tuple[str, ...]) -> tuple[str, Spelling] | None:
        """The question and the spelling that have turned out to suit the model."""
        return self._suited.get(templates)

    def suits(self, templates: tuple[str, ...], template: str, spelling: Spelling) -> None:
        """Remembers which question and spelling suit the model."""
        self._suited[templates] = template, spelling

    def scorer(self, question: str, spellings: Sequence[Spelling]) -> ImageScorer:
        """What scores yes and no, in each spelling, as answers to a question."""
        processor = self.processor
        end = processor.tokenizer.token_id(IM_END)
        choices = [[*processor.tokenizer.encode(word), end] for pair in spellings for word in pair]
        ids = processor.encode(question, 1)
        return ImageScorer(self.model, ids, choices)


class Inquiry:
    """One query on its way through an album.

    The first pictures decide in which spelling the model says yes and no, and whether it has to be told to say nothing
    else: the first question counts to which these are its most probable answers.

    Args:
        asker: Asks.
        query: What pictures should show.
    """

    def __init__(self, asker: Asker, query: str) -> None:
        self._asker = asker
        self._query = query
        self._templates = asker.templates(query)
        self._scorer: ImageScorer | None = None
        self._length = 0
        if (suited := asker.suited(self._templates)) is not None:
            self._settle(*suited)

    def _settle(self, template: str, spelling: Spelling) -> None:
        question = template.replace(PLACE, self._query)
        self._scorer = self._asker.scorer(question, [spelling])
        self._length = len(self._asker.processor.encode(question, 1))

    def batch(self, visual_tokens: int) -> int:
        """How many pictures of so many visual tokens are asked about at a time."""
        if self._asker.given_batch is not None:
            return self._asker.given_batch
        positions = visual_tokens + (self._length or _USUAL_LENGTH)
        return max(1, min(MOST_IMAGES, POSITIONS // positions))

    def __call__(self, visual_tokens: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """The logarithm (B,) of the odds of yes against no for each picture, of visual tokens (N, D) each.

        Raises:
            CheckpointError: If the model computes no numbers.
        """
        shown = np.stack(visual_tokens)
        if self._scorer is None:
            return self._first(shown)
        scores = self._scorer(shown)
        odds: NDArray[np.float64] = scores[:, 0] - scores[:, 1]
        return odds

    def _first(self, shown: NDArray[Any]) -> NDArray[np.float64]:
        """The odds of the first pictures, which decide how the others are asked about."""
        best = (-1.0, self._templates[0], _YES_NO[0], np.zeros(len(shown)))
        for template in self._templates:
            spellings = spellings_of(template)
            scores = self._asker.scorer(template.replace(PLACE, self._query), spellings)(shown)
            for number, spelling in enumerate(spellings):
                yes, no = scores[:, 2 * number], scores[:, 2 * number + 1]
                certainty = float(np.mean(np.exp(yes) + np.exp(no)))
                if certainty > best[0]:
                    best = certainty, template, spelling, yes - no
            if best[0] >= _PLAIN:
                break
        _, template, spelling, odds = best
        self._asker.suits(self._templates, template, spelling)
        self._settle(template, spelling)
        return odds


def spellings_of(template: str) -> tuple[Spelling, ...]:
    """How yes and no may be said in the language of a question."""
    return _YOU_MEI if is_unspaced(template) else _YES_NO


def probability(odds: float) -> float:
    """The probability whose odds have this logarithm."""
    return 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
