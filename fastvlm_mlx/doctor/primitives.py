"""Checks single operations of the device against NumPy: rotary positions, masks and quantized products."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.doctor.agreement import PART, allowed, relative_error, values
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import on_cpu, on_device
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.language import attention
from fastvlm_mlx.model.quantized import dequantized

_ROPE_LIMIT = 5e-3
_ROPE_REASON = "of RoPE, since a GPU's fast cosine is off by this much at position 250; a wrong position by about 1"


def rotary_positions(model: FastVLM) -> Iterator[Check]:
    """Yields checks of RoPE: one offset for all rows, and an offset for each, of one position and of several."""
    text = model.config.text_config
    for length in (1, 5):
        for kind, offset in (("one offset", 250), ("an offset for each row", [3, 17, 250])):
            x = np.random.default_rng(length).normal(size=(3, 2, length, text.head_dim)).astype(np.float32)
            with on_device():
                rotated = mx.fast.rope(
                    mx.array(x),
                    text.head_dim,
                    traditional=False,
                    base=text.rope_theta,
                    scale=1.0,
                    offset=mx.array(offset) if isinstance(offset, list) else offset,
                )
                mx.eval(rotated)
            expected = _rotated(x, np.broadcast_to(offset, 3), text.rope_theta)
            name = f"RoPE of {length} position{'s' if length > 1 else ''}, {kind}"
            error = relative_error(values(rotated), expected)
            yield Check.below(PART, name, error, _ROPE_LIMIT, _ROPE_REASON, "float32")


def _rotated(x: npt.NDArray[np.float32], offsets: npt.NDArray[np.int_], base: float) -> npt.NDArray[np.float64]:
    """(B, heads, L, D) with each half-pair of channels turned by its position, in float64."""
    half = x.shape[-1] // 2
    positions = offsets[:, None] + np.arange(x.shape[2])
    angles = (positions[..., None] * base ** (-np.arange(half) / half))[:, None]
    first, second = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def padded_masks(model: FastVLM) -> Iterator[Check]:
    """Yields checks of attention under the masks of a batch that is padded on the left: of a prompt, and of a step."""
    text = model.config.text_config
    heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    padding, total = [0, 3], 9
    random = np.random.default_rng(0)
    for length, name in ((total, "a prompt"), (1, "a step")):
        q, k, v = (
            random.normal(size=(2, count, n, size)).astype(np.float32)
            for count, n in ((heads, length), (kv_heads, total), (kv_heads, total))
        )
        with on_device():
            cache = KVCache(padding)
            cache.offset = total - length
            attended = attention(mx.array(q), mx.array(k), mx.array(v), cache.make_mask(length))
            mx.eval(attended)
        expected = _attended(q, k, v, padding)
        # What padding positions attend to is of no consequence.
        seen = (np.arange(total - length, total) >= np.array(padding)[:, None])[:, None, :, None]
        limit, reason = allowed("float32")
        error = relative_error(values(attended) * seen, expected * seen)
        yield Check.below(PART, f"mask of {name} with padding", error, limit, reason, "float32")


def _attended(
    q: npt.NDArray[np.float32], k: npt.NDArray[np.float32], v: npt.NDArray[np.float32], padding: list[int]
) -> npt.NDArray[np.float64]:
    """Attention (B, heads, L, D) by its definition, in float64."""
    groups, length, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    keys, values = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
    scores = q @ keys.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    places, queries = np.arange(total), np.arange(total - length, total)[:, None]
    for row, left in enumerate(padding):
        visible = (places <= queries) & (places >= left) | (places == queries)
        scores[row] = np.where(visible, scores[row], -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended: npt.NDArray[np.float64] = weights / weights.sum(-1, keepdims=True) @ values
    return attended


def quantized_products(model: FastVLM) -> Iterator[Check]:
    """Yields checks of products with packed weights against the same weights unpacked, of one row and of many."""
    precision = str(model.dtype).removeprefix("mlx.core.")
    down = model.language_model.layers[0].mlp.down_proj
    for path, layer in (("mm_projector.0", model.mm_projector[0]), ("layers.0.mlp.down_proj", down)):
        if isinstance(layer, nn.QuantizedLinear):
            yield from _packed_product(path, layer, precision)
            continue
        sizes = [size for size in (64, 32) if layer.weight.shape[1] % size == 0]
        for bits in (8, 4) if sizes else ():
            yield from _packed_product(path, nn.QuantizedLinear.from_linear(layer, sizes[0], bits), precision)


def _packed_product(path: str, layer: nn.QuantizedLinear, precision: str) -> Iterator[Check]:
    plain = dequantized(layer, mx.float32)
    inputs = plain.weight.shape[1]
    limit, reason = allowed(precision)
    for rows in (1, 8):
        x = mx.array(np.random.default_rng(rows).normal(size=(rows, inputs)).astype(np.float32))
        with on_cpu():
            expected = plain(x)
            mx.eval(expected)
        with on_device():
            product = layer(x.astype(getattr(mx, precision)))
            mx.eval(product)
        error = relative_error(values(product), values(expected))
        name = f"{path}, {layer.bits} bits, {rows} row{'s' if rows > 1 else ''}"
        yield Check.below(PART, name, error, limit, reason, precision)
