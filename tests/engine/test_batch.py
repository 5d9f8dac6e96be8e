"""Rows of a batch are what they are alone."""

import numpy as np
import pytest

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, PromptError
from tests.checkpoints import APPLE

IMAGES = [APPLE / "images" / f"{name}.png" for name in ("landscape", "portrait", "square")]
PROMPTS = ["What is it?", "Describe the image in a few words, please.", "Why?"]


def test_each_row_has_its_own_settings_key_and_limit(loaded):
    model, processor = loaded
    configs = [
        GenerationConfig(max_tokens=9, temperature=1.2, seed=3),
        GenerationConfig(max_tokens=20),
        GenerationConfig(max_tokens=4, temperature=0.7, top_k=10, repetition_penalty=1.2, seed=3),
    ]
    together = model.generate(**processor(IMAGES, PROMPTS), config=configs)
    alone = [
        model.generate(**processor(image, prompt), config=config)[0]
        for image, prompt, config in zip(IMAGES, PROMPTS, configs, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_gives_a_row_the_same_answer_whatever_its_neighbours(loaded, seed):
    model, processor = loaded
    options = {"max_tokens": 10, "temperature": 1.0, "seed": seed}
    order = np.random.default_rng(seed).permutation(3)
    together = model.generate(**processor([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), **options)
    for row, i in zip(together, order, strict=True):
        assert row == model.generate(**processor(IMAGES[i], PROMPTS[i]), **options)[0]


def test_a_row_ends_with_its_context(loaded, monkeypatch):
    model, processor = loaded
    inputs = processor(IMAGES[:2], PROMPTS[:2])
    lengths = [int(row.sum()) + 3 for row in inputs["attention_mask"]]
    context = max(lengths) + 2
    monkeypatch.setattr(type(model.config), "context_length", context)
    answers = model.generate(**inputs, max_tokens=50, ignore_eos=True)
    assert [len(answer) for answer in answers] == [context - length for length in lengths]
    monkeypatch.setattr(type(model.config), "context_length", max(lengths))
    with pytest.raises(PromptError, match=f"takes {max(lengths)} positions but the context has {max(lengths)}"):
        model.generate(**inputs)


@pytest.mark.parametrize("wrong", [10**6, -1, -201, 384])
def test_an_id_outside_the_vocabulary_is_refused(loaded, wrong):
    model, _ = loaded
    with pytest.raises(PromptError, match=f"token id {wrong} is outside the vocabulary of 384"):
        model.generate([[5, wrong, 7]], max_tokens=2)


def test_configs_and_rows_must_match(loaded):
    model, _ = loaded
    with pytest.raises(ConfigError, match="2 configs for 1 rows"):
        model.generate([[5, 7]], config=[GenerationConfig()] * 2)
    with pytest.raises(ConfigError, match="stop strings are about text"):
        model.generate([[5, 7]], stop="x")
