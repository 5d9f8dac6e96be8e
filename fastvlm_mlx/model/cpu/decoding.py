"""A position of one row on a CPU, computed in NumPy when it is called.

One token reads every weight of the decoder once, and memory is the limit. NumPy's product of a matrix and a vector
reads them at that limit, on all cores; MLX's CPU backend has matrix products only, and its small kernels and their
threads cost a third of a token. Weights, keys and values are MLX's own memory.

Shapes: D hidden size, H heads, K heads of keys and values, S positions held, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.kv_slab import SlabLayer

if TYPE_CHECKING:
    from fastvlm_mlx.model.language import Attention, Qwen2, TransformerBlock

Array = npt.NDArray[np.float32]


def is_plain(decoder: "Qwen2") -> bool:
    """Whether a decoder has nothing but float32 weights, with its projections fused."""
    if decoder.model.norm.weight.dtype != mx.float32 or type(decoder.model.embed_tokens) is not nn.Embedding:
        return False
    linears = [decoder.lm_head] if "lm_head" in decoder else []
    for layer in decoder.layers:
        if "qkv_proj" not in layer.self_attn or "gate_up_proj" not in layer.mlp:
            return False
        linears += [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    return all(type(linear) is nn.Linear for linear in linears)


def holds_one_row(cache: Any) -> bool:
    """Whether a decoder's cache holds some positions of one row and nothing else."""
    first = cache[0] if cache else None
    return isinstance(first, KVCache | SlabLayer) and first.has_one_row


def step(decoder: "Qwen2", token: int, cache: Sequence[KVCache | SlabLayer]) -> mx.array:
    """Logits (1, 1, V) behind one more token of the row in `cache`, which is written."""
    with np.errstate(all="ignore"):  # what is no number is noticed in the logits
        x = _array(decoder.model.embed_tokens.weight)[token]
        turn = _rotation(cache[0].next_position, decoder.config.head_dim, decoder.config.rope_theta)
        for layer, layer_cache in zip(decoder.layers, cache, strict=True):
            x = _block(layer, x, turn, layer_cache)
        head = decoder.lm_head if "lm_head" in decoder else decoder.model.embed_tokens
        return mx.array(_array(head.weight) @ _normed(decoder.model.norm, x))[None, None]


def _array(weight: mx.array) -> Array:
    """The memory of an array, without a copy."""
    return np.asarray(weight)


def _normed(norm: nn.RMSNorm, x: Array) -> Array:
    normed: Array = x * (1 / np.sqrt(np.vdot(x, x) / x.size + np.float32(norm.eps))) * _array(norm.weight)
    return normed


def _rotation(position: int, head_dim: int, theta: float) -> tuple[Array, Array]:
    """The cosines and sines (head_dim / 2,) of a position, from float32 angles as everywhere else."""
    half = head_dim // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(theta) / half))
    angles = np.float32(position) * frequencies
    return np.cos(angles), np.sin(angles)


def _block(layer: "TransformerBlock", x: Array, turn: tuple[Array, Array], cache: KVCache | SlabLayer) -> Array:
    """(D,) -> (D,)."""
    x = x + _array(layer.self_attn.o_proj.weight) @ _attended(
        layer.self_attn, _normed(layer.input_layernorm, x), turn, cache
    )
    both = _array(layer.mlp.gate_up_proj.weight) @ _normed(layer.post_attention_layernorm, x)
    gate, up = both[: both.size // 2], both[both.size // 2 :]
    hidden = gate / (1 + np.exp(-gate)) * up
    result: Array = x + _array(layer.mlp.down_proj.weight) @ hidden
    return result


def _attended(attention: "Attention", x: Array, turn: tuple[Array, Array], cache: KVCache | SlabLayer) -> Array:
    """(D,) -> (H · head_dim,), before the output projection."""
    heads, kv_heads, projection = attention.num_heads, attention.num_kv_heads, attention.qkv_proj
    qkv = (_array(projection.weight) @ x + _array(projection.bias)).reshape(heads + 2 * kv_heads, -1)
    half, (cosine, sine) = attention.head_dim // 2, turn
    first, second = qkv[:-kv_heads, :half], qkv[:-kv_heads, half:]
    turned = np.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=1)
    keys, values = cache.write_row(turned[heads:], qkv[-kv_heads:])
    queries = turned[:heads].reshape(kv_heads, heads // kv_heads, -1) * np.float32(attention.head_dim**-0.5)
    scores = queries @ keys.swapaxes(1, 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended: Array = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return attended.reshape(-1)
