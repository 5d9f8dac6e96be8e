"""Keys and values of earlier prompts."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine.prefix_cache import PrefixCache, prefix_key
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.resolve import load
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"


def test_continuing_gives_the_logits_of_starting_anew(loaded):
    model, processor = loaded
    cache = PrefixCache()
    before = processor([IMAGE], "What is it?")
    now = processor([IMAGE], "Where is the dog?")
    keys = [prefix_key(inputs["input_ids"][0].tolist(), inputs["pixel_values"]) for inputs in (before, now)]
    cache.store(keys[0], model.prefill(**before)[1])
    reused, known = cache.match(keys[1], 4)
    logits = model.prefill(now["input_ids"][:, reused:], cache=known)[0]
    # Float32 sums over other shapes; a wrong position or token moves logits by whole units.
    np.testing.assert_allclose(logits, model.prefill(**now)[0], rtol=0, atol=1e-4)


def test_reuse_is_bounded_in_bytes(loaded):
    model, processor = loaded
    inputs = processor([IMAGE], "What is it?")
    ids = inputs["input_ids"][0].tolist()
    filled = model.prefill(**inputs)[1]
    one = sum(layer.nbytes for layer in filled)
    cache = PrefixCache(max_bytes=2 * one)
    keys = [prefix_key(ids, inputs["pixel_values"] + np.uint8(n)) for n in range(3)]
    for key in keys:
        cache.store(key, filled)
        assert cache.nbytes <= 2 * one
    known = [cache.match(key, 4)[0] for key in keys]
    assert known[0] < known[1] == known[2] == len(ids) - 1
    off = PrefixCache(max_bytes=0)
    off.store(keys[0], filled)
    assert off.match(keys[0], 4) == (0, None)


def test_memory_held_is_memory_counted(loaded):
    """A prompt that continues an earlier one must not keep more than its own positions."""
    model, processor = loaded
    cache = PrefixCache()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(20)]
    limit = mx.set_cache_limit(0)  # a buffer that is used again may be larger than what it is used for
    try:
        generate(model, processor, image=images[0], max_tokens=2, prefix_cache=cache)
        held, counted = mx.get_active_memory(), cache.nbytes
        for image in images[1:]:
            generate(model, processor, image=image, max_tokens=2, prefix_cache=cache)
        counted, held = cache.nbytes - counted, mx.get_active_memory() - held
    finally:
        mx.set_cache_limit(limit)
    assert len(cache) == 20
    assert counted <= held <= 1.1 * counted


def test_a_damaged_entry_is_dropped_and_the_answer_right(loaded):
    cache = PrefixCache()
    asked = {"image": IMAGE, "prompt": "What is it?", "max_tokens": 8}
    whole = generate(*loaded, **asked)
    generate(*loaded, **asked, prefix_cache=cache)
    (entry,) = cache._entries.values()
    entry.layers = entry.layers[..., :3, :]
    again = generate(*loaded, **asked, prefix_cache=cache)
    assert (again.token_ids, again.reused_tokens) == (whole.token_ids, 0)
    assert generate(*loaded, **asked, prefix_cache=cache).reused_tokens > 0


def test_a_cache_serves_one_model(loaded, converted):
    cache = PrefixCache()
    generate(*loaded, image=IMAGE, max_tokens=1, prefix_cache=cache)
    other = load(converted("apple"))
    with pytest.raises(ConfigError, match="another model"):
        generate(*other, image=IMAGE, max_tokens=1, prefix_cache=cache)
    cache.clear()
    assert generate(*other, image=IMAGE, max_tokens=1, prefix_cache=cache).generated_tokens == 1
