"""From logits to tokens, each row by itself."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.sampling import Sampler, read_tokens, sample
from fastvlm_mlx.errors import FastVLMError

LOGITS = mx.array([[1.0, 3.0, 2.0, 0.0, -1.0, 2.5]])


def kept(**settings):
    """The tokens that can still be drawn."""
    sampler = Sampler(GenerationConfig(temperature=1.0, seed=0, **settings))
    return set(np.flatnonzero(np.isfinite(np.array(sampler.logprobs(LOGITS))[0])).tolist())


def test_filters_keep_what_their_definitions_say():
    probabilities = np.exp(np.array(LOGITS[0])) / np.exp(np.array(LOGITS[0])).sum()
    assert kept() == set(range(6))
    assert kept(top_k=2) == {1, 5}
    assert kept(min_p=float(probabilities[2] / probabilities[1]) * 0.99) == {1, 5, 2}
    assert kept(top_p=float(probabilities[1]) * 0.5) == {1}
    assert kept(top_p=float(probabilities[1]) * 1.01) == {1, 5}
    assert kept(top_p=0.999999) == set(range(6))


def test_samples_follow_the_tempered_distribution():
    sampler = Sampler(GenerationConfig(temperature=0.7, seed=3))
    tokens = np.array(mx.concatenate([sampler(LOGITS) for _ in range(1000)]))
    weights = np.exp(np.array(LOGITS[0]) / 0.7)
    # Four standard deviations of a proportion over 1,000 draws are 0.063.
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / 1000, weights / weights.sum(), atol=0.063)


def test_a_repetition_penalty_counts_prompt_and_answer():
    sampler = Sampler(GenerationConfig(repetition_penalty=2.0), [1])
    assert [int(sampler(LOGITS).item()) for _ in range(3)] == [5, 2, 1]


def drawn(logits, count, **settings):
    """The first tokens that a sampler chooses, always from the same logits."""
    sampler = Sampler(GenerationConfig(**settings))
    return [int(sampler(mx.array([logits])).item()) for _ in range(count)]


def test_a_presence_penalty_counts_a_token_of_the_answer_once():
    assert drawn([2.0, 1.5, 0.0], 5, presence_penalty=1.0) == [0, 1, 0, 0, 0]
    assert Sampler(GenerationConfig(presence_penalty=2.0), [1])(LOGITS).item() == 1, "the prompt does not count"


def test_a_frequency_penalty_counts_a_token_of_the_answer_each_time():
    assert drawn([2.0, 1.3, 0.0], 6, frequency_penalty=0.5) == [0, 0, 1, 0, 1, 0]


def test_a_negative_penalty_favours_what_is_there():
    assert drawn([2.0, 1.9, 0.0], 4, presence_penalty=-2.0) == [0, 0, 0, 0]


def test_a_bias_adds_to_the_logit_of_its_token():
    assert drawn([2.0, 1.5, 0.0], 1, logit_bias={2: 1.9}) == [0]
    assert drawn([2.0, 1.5, 0.0], 1, logit_bias={"2": 2.1}) == [2]
    assert drawn([2.0, 1.5, 0.0], 2, logit_bias=[(0, -100), (1, -100)], repetition_penalty=2.0) == [2, 2]


def test_a_row_that_begins_again_goes_on_as_it_would_have():
    config = GenerationConfig(
        temperature=1.0, seed=7, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={4: 2}
    )
    whole, again = Sampler(config, [3]), Sampler(config, [3])
    tokens = [int(whole(LOGITS).item()) for _ in range(9)]
    again.skip(tokens[:4])
    assert [int(again(LOGITS).item()) for _ in range(5)] == tokens[4:]


def test_logprobs_are_those_of_the_model_before_every_setting():
    expected = np.array(LOGITS[0]) - np.log(np.exp(np.array(LOGITS[0])).sum())
    sampler = Sampler(GenerationConfig(logprobs=3, logit_bias={0: 50}, temperature=2.0, seed=1, top_k=1))
    read_tokens(sample(LOGITS, [sampler]))
    token, logprob, top = sampler.take_logprob()
    assert (token, [each for each, _ in top]) == (0, [1, 5, 2])
    np.testing.assert_allclose([logprob, *(value for _, value in top)], expected[[0, 1, 5, 2]], rtol=1e-6)
    assert sampler.take_logprob() is None


def test_logprobs_of_zero_report_the_token_alone():
    sampler = Sampler(GenerationConfig(logprobs=0))
    read_tokens(sample(LOGITS, [sampler]))
    assert sampler.take_logprob()[::2] == (1, ())


@pytest.mark.parametrize("temperature", [1e-30, 1e-320])
def test_a_temperature_near_zero_takes_the_most_probable_token(temperature):
    assert Sampler(GenerationConfig(temperature=temperature, seed=1))(LOGITS).item() == 1


def test_the_highest_temperature_draws_no_token_that_is_ruled_out():
    sampler = Sampler(GenerationConfig(temperature=1e300, top_k=2, seed=0))
    drawn_tokens = {int(sampler(LOGITS).item()) for _ in range(40)}
    assert drawn_tokens == {1, 5}


def test_a_row_draws_what_it_draws_alone():
    rng = np.random.default_rng(0)
    configs = [
        GenerationConfig(),
        GenerationConfig(temperature=1.0, seed=5),
        GenerationConfig(temperature=0.8, top_k=20, repetition_penalty=1.3, seed=5),
        GenerationConfig(temperature=1.5, top_p=0.9, seed=6),
        GenerationConfig(repetition_penalty=1.5),
        GenerationConfig(presence_penalty=2.0, logprobs=2),
        GenerationConfig(frequency_penalty=1.5, logit_bias={3: 4.0, 7: -100.0}, temperature=1.0, seed=7),
    ]
    steps = [mx.array(rng.normal(0, 3, (len(configs), 50)), mx.float32) for _ in range(12)]
    together = [Sampler(config, [1, 2]) for config in configs]
    batch = np.stack([np.array(sample(logits, together)) for logits in steps])
    for row, config in enumerate(configs):
        alone = Sampler(config, [1, 2])
        assert [sample(logits[row : row + 1], [alone]).item() for logits in steps] == batch[:, row].tolist()


class Only:
    """A constraint that always allows the same tokens."""

    complete = False

    def __init__(self, *tokens):
        self.allowed = np.isin(np.arange(6), tokens)
        self.told = []

    def advance(self, token):
        self.told.append(token)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 1, "top_p": 0.9, "top_k": 4, "min_p": 0.01}])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_constraint_rules_out_tokens_of_its_row_only(settings, dtype):
    logits = mx.concatenate([LOGITS] * 3).astype(dtype)
    config = GenerationConfig(repetition_penalty=1.1, presence_penalty=0.5, logit_bias={1: 100.0}, **settings)
    samplers = [Sampler(config, [2]), Sampler(config, [2], Only(0, 4)), Sampler(config, [2], Only(3))]
    alone = Sampler(config, [2])
    for _ in range(8):
        free, bound, single = read_tokens(sample(logits, samplers))
        assert [free] == read_tokens(sample(logits[:1], [alone]))
        assert bound in (0, 4)
        assert single == 3
    samplers[1].skip([4, 0])
    assert samplers[1].constraint.told == [4, 0]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sampled", [False, True])
def test_logits_that_are_not_numbers_are_an_error_of_any_row(wrong, place, dtype, sampled):
    samplers = [Sampler(GenerationConfig(temperature=1.0 * sampled, seed=1)) for _ in range(2)]
    logits = np.array(mx.concatenate([LOGITS, LOGITS]))
    assert read_tokens(sample(mx.array(logits).astype(dtype)[1:], samplers[1:])) != [-1]
    logits[1, place] = wrong
    for rows in (logits, logits[1:]):
        with pytest.raises(FastVLMError, match=r"NaN or infinite.*weights are damaged.*fastvlm verify.*fastvlm doctor"):
            read_tokens(sample(mx.array(rows).astype(dtype), samplers[-len(rows) :]))


def test_a_token_that_is_ruled_out_is_no_error():
    assert read_tokens(sample(mx.array([[0.0, -np.inf, 1.0]]), [Sampler(GenerationConfig())])) == [2]
