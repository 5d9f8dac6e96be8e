"""Choices with probabilities."""

import pytest

from fastvlm_mlx import PrefixCache, PromptError, choose, generate
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"
CHOICES = ["yes", "no", "yes and no"]


def test_probabilities_do_not_depend_on_the_order_or_on_what_was_asked_before(loaded):
    cache = PrefixCache()
    first = choose(*loaded, CHOICES, image=IMAGE, prompt="Is it?", prefix_cache=cache)
    again = choose(*loaded, CHOICES[::-1], image=IMAGE, prompt="Is it?", prefix_cache=cache)[::-1]
    assert [choice.text for choice in first] == CHOICES
    assert sum(choice.probability for choice in first) == pytest.approx(1)
    assert sum(choice.corrected for choice in first) == pytest.approx(1)
    for a, b in zip(first, again, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)  # float32, prefilled in one part or in two
    assert len(cache) == 1


def test_a_longer_choice_is_not_punished_for_its_length_when_corrected(loaded):
    short, _, long = choose(*loaded, CHOICES, image=IMAGE, prompt="Is it?")
    assert long.tokens > short.tokens
    assert long.probability < short.probability
    assert long.corrected / short.corrected > long.probability / short.probability


def test_scoring_leaves_the_prefix_cache_right_for_an_answer(loaded):
    cache = PrefixCache()
    alone = generate(*loaded, image=IMAGE, prompt="Is it?", max_tokens=8)
    choose(*loaded, CHOICES, image=IMAGE, prompt="Is it?", prefix_cache=cache)
    after = generate(*loaded, image=IMAGE, prompt="Is it?", max_tokens=8, prefix_cache=cache)
    assert after.token_ids == alone.token_ids
    assert after.reused_tokens == after.prompt_tokens - 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", "choices must be a list of texts"),
        (["yes"], "at least two"),
        (["yes", " "], "not empty"),
        (["yes", 3], "must be a text"),
        (["yes", "no", "yes"], "yes is given twice"),
        (["yes", "no " * 9000], "the context has room for"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(loaded, choices, message):
    with pytest.raises(PromptError, match=message):
        choose(*loaded, choices, prompt="Is it?")
