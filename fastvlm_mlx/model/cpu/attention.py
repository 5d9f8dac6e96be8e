"""Attention with a softmax that MLX's CPU backend runs seven times faster than its own."""

from fastvlm_mlx.backend import mx
from fastvlm_mlx.model.activations import exp_below


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None) -> mx.array:
    """Attention (B, heads, L, head_dim) of queries that are scaled already; arguments as in `language.attention`."""
    (batch, heads, length, head_dim), (kv_heads, total) = queries.shape, keys.shape[1:3]
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    # OpenBLAS multiplies by keys in this order where they are; else it copies them, and wakes a thread that then spins.
    scores = (grouped @ mx.contiguous(keys.swapaxes(2, 3))).reshape(batch, heads, length, total)
    if mask is not None:
        allowed = mx.tri(length, total, total - length, dtype=mx.bool_) if isinstance(mask, str) else mask
        scores = scores + mx.where(allowed, 0.0, mx.finfo(mx.float32).min / 2)
    weights = exp_below(scores, scores.max(axis=-1, keepdims=True))
    weighted = weights.reshape(batch, kv_heads, -1, total) @ values
    return weighted.reshape(batch, heads, length, head_dim) / weights.sum(axis=-1, keepdims=True)
