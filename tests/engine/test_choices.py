"""Scores of given answers."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine.choices import Trie, score
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"


def by_decoding(model, inputs, tokens):
    """The logarithm of the probability of tokens that are decoded one after the other."""
    logits, cache = model.prefill(**inputs)
    total = 0.0
    for token in tokens:
        row = np.array(logits[0], dtype=np.float64)
        total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        logits = model.language_model(mx.array([[token]]), cache)[:, -1]
    return total


@pytest.mark.parametrize(
    "choices",
    [[[7]], [[7, 3], [8, 3]], [[5, 6, 7, 3], [5, 6, 3], [5, 3], [9, 6, 7, 3], [5, 6, 7, 8, 9, 10, 3]]],
    ids=["one token", "no common beginning", "common beginnings"],
)
def test_a_score_is_the_sum_over_the_tokens_decoded_one_by_one(loaded, choices):
    model, processor = loaded
    inputs = processor(IMAGE, "What is it?")
    logits, cache = model.prefill(**inputs)
    # Sums of up to 7 float32 logarithms of about 6 each; a wrong position or neighbour moves them by tenths.
    expected = [by_decoding(model, inputs, tokens) for tokens in choices]
    np.testing.assert_allclose(score(model, logits, cache, choices), expected, rtol=0, atol=1e-3)


def test_common_beginnings_are_computed_once():
    trie = Trie([[5, 6, 7], [5, 6, 8], [5, 9], [4]])
    assert trie.tokens == [5, 6]
    assert trie.parents == [0, 1]
    assert trie.edges() == ([0, 1, 2, 0, 1, 2, 0, 1, 0], [5, 6, 7, 5, 6, 8, 5, 9, 4])


def test_all_answers_of_one_token_share_the_whole_probability(loaded):
    model, processor = loaded
    logits, cache = model.prefill(**processor(IMAGE, "What is it?"))
    scores = score(model, logits, cache, [[token] for token in range(logits.shape[1])])
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)
