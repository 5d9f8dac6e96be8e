"""Qwen2, the decoder of FastVLM.

Implemented here because importing mlx-lm takes longer than an answer. It is called as mlx-lm's models are, and a test
compares it with mlx-lm's.

Shapes: B batch, L positions of this call, S positions of the cache, D hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import device, mx, nn
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.model.activations import swiglu
from fastvlm_mlx.model.cpu import decoding
from fastvlm_mlx.model.cpu.attention import attention as cpu_attention
from fastvlm_mlx.model.cpu.first_pass import FirstPass
from fastvlm_mlx.model.cpu.products import are_few, product, suits
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.rows import row_parts, split_projection


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None) -> mx.array:
    """Scaled dot-product attention (B, heads, L, head_dim), in the form that suits the device.

    Args:
        queries: (B, heads, L, head_dim).
        keys: (B, kv_heads, S, head_dim); each head serves several of the queries'.
        values: (B, kv_heads, S, head_dim).
        mask: True where a query may attend, (B, 1, L, S) or broadcastable; or `causal`; or None.
    """
    scale = queries.shape[-1] ** -0.5
    if device() == "cpu" and queries.dtype == mx.float32 and queries.shape[2] > 1:
        return cpu_attention(queries * scale, keys, values, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: (B, L, D) -> (B, L, D), added to `residual`.

    Queries, keys and values come from one product, and one rotary embedding turns queries and keys.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.rope_theta = config.rope_theta
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * config.head_dim)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _qkv(self, x: mx.array) -> mx.array:
        """(B, L, D) -> (B, heads of queries, keys and values, L, head_dim)."""
        if "qkv_proj" in self:
            packed = linear(self.qkv_proj, x)
        else:
            packed = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        return packed.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: Any, residual: mx.array, *, last: bool = False
    ) -> mx.array:
        qkv = self._qkv(x)
        turned, values = qkv[:, : -self.num_kv_heads], qkv[:, -self.num_kv_heads :]
        offset = cache.offset if cache is not None else 0
        turned = mx.fast.rope(turned, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset)
        queries, keys = turned[:, : self.num_heads], turned[:, self.num_heads :]
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if last:
            queries, residual = queries[:, :, -1:], residual[:, -1:]
            mask = mask[..., -1:, :] if isinstance(mask, mx.array) else None
        x = attention(queries, keys, values, mask)
        return added(residual, self.o_proj, x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1))


class MLP(nn.Module):
    """SwiGLU: (B, L, D) -> (B, L, D), added to `residual`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def _gate_and_up(self, x: mx.array) -> list[mx.array]:
        """(B, L, D) -> twice (B, L, hidden units)."""
        if "gate_up_proj" not in self:
            return [self.gate_proj(x), self.up_proj(x)]
        if device() == "cpu" and not are_few(x):
            # MLX's CPU kernels are slow on the halves of each row.
            return [linear(part, x) for part in row_parts(self.gate_up_proj, 2)]
        return list(mx.split(linear(self.gate_up_proj, x), 2, axis=-1))

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        return added(residual, self.down_proj, swiglu(*self._gate_and_up(x)))


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """`layer(x)`, in the form that suits the device."""
    if type(layer) is nn.Linear and suits(x):
        products = product(x, layer.weight)
        return products + layer.bias if "bias" in layer else products
    outputs: mx.array = layer(x)
    return outputs


def added(residual: mx.array, layer: nn.Module, x: mx.array) -> mx.array:
    """`residual + layer(x)`, as one kernel where a GPU has it."""
    if type(layer) is nn.Linear and "bias" not in layer and device() == "gpu":
        return mx.addmm(residual, x, layer.weight.T)
    return residual + linear(layer, x)


class TransformerBlock(nn.Module):
    """(B, L, D) -> (B, L, D), or with `last` (B, 1, D): only the last position is computed from attention on."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None, *, last: bool = False
    ) -> mx.array:
        x = self.self_attn(self.input_layernorm(x), mask, cache, x, last=last)
        return self.mlp(self.post_attention_layernorm(x), x)


class Qwen2Model(nn.Module):
    """Embedding, blocks, final norm: (B, L) token ids or (B, L, D) embeddings -> (B, L, D), with `last` (B, 1, D)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [TransformerBlock(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        tokens: mx.array | None,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
        *,
        last: bool = False,
        first_pass: FirstPass | None = None,
    ) -> mx.array:
        x = self.embed_tokens(tokens) if input_embeddings is None else input_embeddings
        caches = cache if cache is not None else [None] * len(self.layers)
        first = caches[0] if caches[0] is not None else KVCache()
        mask = first.make_mask(x.shape[1], return_array=False, window_size=None)
        final = len(self.layers) - 1
        layers = self.layers if first_pass is None else first_pass.through(self.layers)
        for index, (layer, layer_cache) in enumerate(zip(layers, caches, strict=True)):
            x = layer(x, mask, layer_cache, last=last and index == final)
            if first_pass is not None:
                mx.eval(x, layer_cache.state)
        normed: mx.array = self.norm(x)
        return normed


class Qwen2(nn.Module):
    """The decoder with its head, called as mlx-lm calls its models.

    `language_model(tokens, cache=None, input_embeddings=None)` -> logits (B, L, V). `tokens` may be None when
    embeddings are given. `cache` is a list with one `KVCache` (or mlx-lm's) per layer.

    Attributes:
        config: Of the decoder.
        first_pass: What the first prompt is computed with while the weights are still in a file; None if they are read.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.first_pass: FirstPass | None = None
        self._is_read = True
        self.model = Qwen2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[TransformerBlock]:
        """The transformer blocks."""
        return self.model.layers

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[KVCache]:
        """An empty cache, one `KVCache` per layer."""
        return [KVCache(left_padding) for _ in self.layers]

    def head(self, x: mx.array) -> mx.array:
        """Logits (B, L, V) of normed hidden states (B, L, D)."""
        if "lm_head" in self:
            return linear(self.lm_head, x)
        if type(self.model.embed_tokens) is nn.Embedding and suits(x):
            return product(x, self.model.embed_tokens.weight)
        logits: mx.array = self.model.embed_tokens.as_linear(x)
        return logits

    @property
    def steps_at_once(self) -> bool:
        """Whether a call with one token of one row computes its logits, and does not only submit them."""
        return device() == "cpu" and decoding.is_plain(self)

    def _steps_row(self, cache: Any) -> bool:
        return decoding.holds_one_row(cache) and self.steps_at_once

    def __call__(
        self, tokens: mx.array | None, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        if not self._is_read:
            mx.eval(self.parameters())
            self._is_read = True
        if tokens is not None and input_embeddings is None and tokens.size == 1 and self._steps_row(cache):
            return decoding.step(self, int(np.asarray(tokens)[0, 0]), cache)
        return self.head(self.model(tokens, cache, input_embeddings))

    def split(self, paths: Iterable[str] | None = None) -> None:
        """Replaces fused projections by their parts, as a checkpoint has them that quantizes these differently.

        Args:
            paths: Of the fused projections, such as `model.layers.0.self_attn.qkv_proj`; by default all of them.
        """
        modules = dict(self.named_modules())
        fused = [path for path in modules if path.rpartition(".")[2] in self.config.part_rows]
        for path in fused if paths is None else paths:
            parent, _, name = path.rpartition(".")
            split_projection(modules[parent], name, self.config.part_rows[name])

    def prefill(self, input_embeddings: mx.array, cache: list[KVCache]) -> mx.array:
        """Logits (B, V) of the last position, filling `cache`: the last block and the head see that position alone."""
        first_pass, self.first_pass = self._fitting_first_pass(), None
        self._is_read = first_pass is None
        return self.head(self.model(None, cache, input_embeddings, last=True, first_pass=first_pass))[:, -1]

    def embed(self, tokens: npt.NDArray[np.int32]) -> mx.array:
        """Embeddings (T, D) of token ids (T,)."""
        if (first_pass := self._fitting_first_pass()) is not None:
            return first_pass.embedded(tokens)
        embedded: mx.array = self.model.embed_tokens(mx.array(tokens))
        return embedded

    def _fitting_first_pass(self) -> FirstPass | None:
        return self.first_pass if self.first_pass is not None and self.first_pass.fits(self) else None
