"""From logits to token ids: sampling, and the decode loop that never waits for the step it has just submitted."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.language import KVCache, Qwen2


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; the filters act on the untempered distribution, in this order, as mlx-lm's do.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: Keep the most probable tokens up to this total probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
        top_k: Keep this many tokens; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of every token seen in prompt or answer; 1 is
            off.
        seed: Makes sampling repeatable; None draws one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Rejects values that mean nothing."""
        bounds = {
            "temperature": (self.temperature, 0.0 <= self.temperature < math.inf, "at least 0"),
            "top_p": (self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "min_p": (self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            "top_k": (self.top_k, self.top_k >= 0, "at least 0"),
            "repetition_penalty": (self.repetition_penalty, 0.0 < self.repetition_penalty < math.inf, "above 0"),
        }
        for name, (value, allowed, rule) in bounds.items():
            if not allowed:
                raise ConfigError(f"{name} must be {rule}, not {value}")


class Sampler:
    """Chooses token ids (B,) from logits (B, V), entirely on the device.

    Args:
        config: How to choose.
        prompts: The text token ids of each row's prompt, which a repetition penalty counts as seen.
    """

    def __init__(self, config: SamplingConfig, prompts: list[list[int]]) -> None:
        self._config = config
        self._prompts = prompts
        self._seen: mx.array | None = None
        seed = config.seed if config.seed is not None else int(np.random.default_rng().integers(2**63))
        self._key = mx.random.key(seed)

    def __call__(self, logits: mx.array) -> mx.array:
        config = self._config
        if config.repetition_penalty != 1.0:
            logits = self._penalized(logits)
        if config.temperature == 0:
            tokens = mx.argmax(logits, axis=-1)
        else:
            self._key, key = mx.random.split(self._key)
            tokens = mx.random.categorical(self._filtered(logits) * (1 / config.temperature), key=key)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, tokens[:, None], mx.array(True), axis=-1)
        return tokens

    def _penalized(self, logits: mx.array) -> mx.array:
        if self._seen is None:
            seen = np.zeros(logits.shape, dtype=np.bool_)
            for row, ids in zip(seen, self._prompts, strict=True):
                row[ids] = True
            self._seen = mx.array(seen)
        penalty = self._config.repetition_penalty
        return mx.where(self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _filtered(self, logits: mx.array) -> mx.array:
        """Log-probabilities (B, V) in float32, -inf for the tokens that are filtered out."""
        config = self._config
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if config.top_p < 1.0:
            order = mx.argsort(-logprobs, axis=-1)
            ranked = mx.take_along_axis(mx.exp(logprobs), order, axis=-1)
            beyond = mx.cumsum(ranked, axis=-1) - ranked >= config.top_p
            logprobs = mx.where(mx.put_along_axis(mx.zeros_like(beyond), order, beyond, axis=-1), -mx.inf, logprobs)
        if config.min_p > 0.0:
            floor = logprobs.max(axis=-1, keepdims=True) + math.log(config.min_p)
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        if 0 < config.top_k < logprobs.shape[-1]:
            floor = mx.min(mx.topk(logprobs, config.top_k, axis=-1), axis=-1, keepdims=True)
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        return logprobs


def decode(
    language_model: Qwen2, logits: mx.array, cache: list[KVCache], sampler: Sampler, max_tokens: int
) -> Iterator[mx.array]:
    """Token ids (B,), one array per step, from the logits (B, V) of the prompt's last position on.

    The first is submitted together with everything that `logits` depends on, as one graph, and read before anything
    else is done. Each later step is submitted before the one before it is read.
    """
    tokens = sampler(logits)
    mx.async_eval(tokens)
    yield tokens
    if max_tokens > 1:
        tokens = sampler(language_model(tokens[:, None], cache)[:, -1])
        mx.async_eval(tokens)
    for step in range(2, max_tokens + 1):
        current = tokens
        if step < max_tokens:
            tokens = sampler(language_model(current[:, None], cache)[:, -1])
            mx.async_eval(tokens)
        yield current
