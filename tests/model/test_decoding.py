"""A step of one row in NumPy: the logits, keys and values of MLX's own, and memory that nobody else sees change."""

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.model import language
from fastvlm_mlx.model.cpu import decoding
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.kv_slab import KVSlab
from fastvlm_mlx.model.language import Qwen2
from fastvlm_mlx.model.quantized import dequantized

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
TOKENS = [5, 17, 3, 96, 40, 8, 8, 1, 60, 22, 31]
# Sums of a few hundred float32 products in another order.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "device", lambda: "cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def decoder(request: pytest.FixtureRequest) -> Qwen2:
    model = Qwen2(TextConfig(**SIZES, tie_word_embeddings=request.param))
    rng = np.random.default_rng(0)
    weights = [
        (name, mx.array(rng.normal(0, 0.1, value.shape), mx.float32))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    return model


def prefilled(decoder: Qwen2, tokens: list[int] = TOKENS) -> list[KVCache]:
    cache = decoder.make_cache()
    decoder.prefill(decoder.model.embed_tokens(mx.array([tokens])), cache)
    return cache


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that are computed in NumPy from now on."""
    seen: list[int] = []
    step = decoding.step
    monkeypatch.setattr(decoding, "step", lambda model, token, cache: seen.append(token) or step(model, token, cache))
    return seen


def test_steps_give_the_logits_of_one_pass(decoder: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", 8)
    seen, cache = calls(monkeypatch), prefilled(decoder)
    following = [int(token) for token in np.random.default_rng(1).integers(0, 97, 2 * KVCache.step + 3)]
    logits = [decoder(mx.array([[token]]), cache)[:, -1] for token in following]  # past two steps of room
    assert seen == following
    whole = decoder(mx.array([[*TOKENS, *following]]))[0, len(TOKENS) :]
    np.testing.assert_allclose(mx.concatenate(logits), whole, **ROUNDING)
    assert cache[0].offset == len(TOKENS) + len(following)


def test_a_row_of_a_slab_gives_the_same(decoder: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, then beside another row, which MLX computes, then alone again."""
    seen, slab = calls(monkeypatch), KVSlab(3)
    slab.insert(prefilled(decoder))
    tokens = list(TOKENS)

    def advance(token: int, rows: int) -> None:
        slab.begin()
        tokens.append(token)
        logits = decoder(mx.array([[token]] * rows), slab.layers)
        np.testing.assert_allclose(logits[0, -1], decoder(mx.array([tokens]))[0, -1], **ROUNDING)

    advance(7, 1)
    slab.insert(prefilled(decoder, [1, 2]))
    advance(8, 2)
    slab.remove(1)
    advance(9, 1)
    assert seen == [7, 9]


def test_single_steps_and_longer_pieces_take_turns(decoder: Qwen2) -> None:
    cache, tokens = prefilled(decoder), list(TOKENS)
    for piece in ([4], [5, 6], [7], [8], [9, 10, 11], [12]):
        tokens += piece
        logits = decoder(mx.array([piece]), cache)[:, -1]
        np.testing.assert_allclose(logits, decoder(mx.array([tokens]))[:, -1], **ROUNDING)


def test_steps_change_no_memory_of_other_caches(decoder: Qwen2) -> None:
    """One continues from views of the other; both are continued, also after the first was set back."""
    first = prefilled(decoder)
    decoder(mx.array([[1]]), first)
    second = [KVCache.of(*layer.filled) for layer in first]
    for layer in second:
        layer.offset -= 1  # now there is room in shared memory
    decoder(mx.array([[50]]), second)
    expected = decoder(mx.array([[*TOKENS, 1, 2]]))[:, -1]
    np.testing.assert_allclose(decoder(mx.array([[2]]), first)[:, -1], expected, **ROUNDING)


def test_what_is_no_plain_row_is_left_to_mlx(decoder: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, token = calls(monkeypatch), mx.array([[1]])
    decoder(token)
    decoder(token, decoder.make_cache())
    padded = decoder.make_cache([3])
    decoder.prefill(decoder.model.embed_tokens(mx.array([TOKENS])), padded)
    decoder(token, padded)
    monkeypatch.setattr(language, "device", lambda: "gpu")
    decoder(token, prefilled(decoder))
    monkeypatch.setattr(language, "device", lambda: "cpu")
    down = decoder.layers[1].mlp.down_proj
    decoder.layers[1].mlp.down_proj = down.to_quantized(32, 8)
    decoder(token, prefilled(decoder))
    decoder.layers[1].mlp.down_proj = dequantized(decoder.layers[1].mlp.down_proj, mx.float32)
    assert not seen
    decoder(token, prefilled(decoder))
    assert seen == [1]
    decoder.split()
    decoder(token, prefilled(decoder))
    assert seen == [1]


def test_weights_that_are_no_numbers_give_such_logits_and_no_warning(decoder: Qwen2) -> None:
    cache = prefilled(decoder)
    decoder.layers[0].mlp.down_proj.weight = mx.full((64, 128), float("inf"))
    assert not np.isfinite(np.array(decoder(mx.array([[1]]), cache))).any()
