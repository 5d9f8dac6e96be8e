"""The decoder against mlx-lm's, its cache against one pass, and its padded batches against single rows."""

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.language import Qwen2
from fastvlm_mlx.projections import PARTS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
TOKENS = mx.array([[5, 17, 3, 96, 40, 8, 8, 1, 60, 22, 31]])
# Sums of a few hundred float32 products in another order.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


def random_weights(model, seed=0):
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(rng.normal(0, 0.1, value.shape), mx.float32))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    return model


def fused_paths(model):
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] in PARTS]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def decoder(request):
    return random_weights(Qwen2(TextConfig(**SIZES, tie_word_embeddings=request.param)))


def test_logits_equal_those_of_mlx_lm(decoder):
    qwen2 = pytest.importorskip("mlx_lm.models.qwen2")
    tied = "lm_head" not in decoder
    theirs = qwen2.Model(qwen2.ModelArgs(model_type="qwen2", rms_norm_eps=1e-6, tie_word_embeddings=tied, **SIZES))
    expected = decoder(TOKENS)
    decoder.split()
    theirs.load_weights(tree_flatten(decoder.parameters()))
    np.testing.assert_allclose(expected, theirs(TOKENS), **ROUNDING)


def test_projections_in_parts_compute_the_same(decoder):
    tokens, whole = mx.concatenate([TOKENS, TOKENS]), decoder(TOKENS)
    together = decoder.prefill(decoder.model.embed_tokens(tokens), decoder.make_cache())
    decoder.split()
    assert not fused_paths(decoder)
    np.testing.assert_allclose(decoder(TOKENS), whole, **ROUNDING)
    apart = decoder.prefill(decoder.model.embed_tokens(tokens), decoder.make_cache())
    np.testing.assert_allclose(apart, together, **ROUNDING)


def test_a_cache_keeps_nothing_but_its_keys_and_values():
    """Those of a prompt are cut from arrays with the queries, too, which would be kept for as long."""
    cache, packed = KVCache(), mx.zeros((1, 8, 10_000, 16))
    mx.eval(cache.update_and_fetch(packed[:, 4:6], packed[:, 6:]))
    mx.synchronize()
    before = mx.get_active_memory()
    del packed
    assert before - mx.get_active_memory() == 8 * 10_000 * 16 * 4
    assert cache.nbytes == 4 * 10_000 * 16 * 4


def test_mlx_lm_generates_with_this_decoder(decoder):
    generate = pytest.importorskip("mlx_lm.generate")
    steps = generate.generate_step(TOKENS[0], decoder, max_tokens=4)
    expected, tokens = [], TOKENS
    for _ in range(4):
        expected.append(mx.argmax(decoder(tokens)[:, -1], axis=-1).item())
        tokens = mx.concatenate([tokens, mx.array([[expected[-1]]])], axis=1)
    assert [token for token, _ in steps] == expected


@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (4, 1, 5, 1), (10, 1)])
def test_cached_passes_equal_one_pass(decoder, pieces):
    cache, start, logits = decoder.make_cache(), 0, []
    for piece in pieces:
        logits.append(decoder(TOKENS[:, start : start + piece], cache=cache))
        start += piece
    np.testing.assert_allclose(mx.concatenate(logits, axis=1), decoder(TOKENS), **ROUNDING)


def test_cache_grows_past_its_step_without_losing_anything(decoder):
    tokens = mx.array(np.random.default_rng(1).integers(0, 97, (1, 600)))
    cache = decoder.make_cache()
    parts = [decoder(tokens[:, a : a + 50], cache=cache) for a in range(0, 600, 50)]
    np.testing.assert_allclose(mx.concatenate(parts, axis=1), decoder(tokens), **ROUNDING)


def test_embeddings_stand_in_for_tokens(decoder):
    embeddings = decoder.model.embed_tokens(TOKENS)
    np.testing.assert_array_equal(decoder(None, input_embeddings=embeddings), decoder(TOKENS))


@pytest.mark.parametrize("length", [1, 2, 11])
def test_prefill_gives_the_last_position_of_one_pass_and_a_full_cache(decoder, length):
    tokens, cache = TOKENS[:, :length], decoder.make_cache()
    logits = decoder.prefill(decoder.model.embed_tokens(tokens), cache)
    np.testing.assert_allclose(logits, decoder(tokens)[:, -1], **ROUNDING)
    following = mx.concatenate([tokens, TOKENS[:, :1]], axis=1)
    np.testing.assert_allclose(decoder(TOKENS[:, :1], cache=cache)[:, -1], decoder(following)[:, -1], **ROUNDING)


def test_left_padded_rows_equal_rows_by_themselves(decoder):
    rows = [TOKENS[:, :11], TOKENS[:, 3:9]]
    embeddings = [decoder.model.embed_tokens(row) for row in rows]
    batch = mx.concatenate([embeddings[0], mx.pad(embeddings[1], ((0, 0), (5, 0), (0, 0)))])
    cache = decoder.make_cache([0, 5])
    logits = decoder.prefill(batch, cache)
    after = decoder(mx.array([[7], [7]]), cache=cache)[:, -1]
    for index, row in enumerate(rows):
        np.testing.assert_allclose(logits[index], decoder(row)[0, -1], **ROUNDING)
        longer = mx.concatenate([row, mx.array([[7]])], axis=1)
        np.testing.assert_allclose(after[index], decoder(longer)[0, -1], **ROUNDING)


def test_caches_that_share_memory_do_not_disturb_each_other(decoder):
    cache = decoder.make_cache()
    decoder(TOKENS, cache=cache)
    kept = [KVCache.of(*layer.filled) for layer in cache]
    first = decoder(mx.array([[1]]), cache=[KVCache.of(*layer.filled) for layer in kept])
    decoder(mx.array([[50, 51]]), cache=cache)
    np.testing.assert_array_equal(decoder(mx.array([[1]]), cache=kept), first)
