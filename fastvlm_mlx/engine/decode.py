"""One prompt and its answer, at the lowest latency: a decode loop that submits step n+1 before it reads step n."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.choices import score
from fastvlm_mlx.engine.constraint import Constraint
from fastvlm_mlx.engine.logprobs import TokenLogprob
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache, PrefixKey, prefix_key
from fastvlm_mlx.engine.sampling import Sampler, agreed, read_tokens, sample
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.streams import turn


class RowDecoder:
    """Decodes one row. Several threads may each run one on the same model, and share a prefix cache.

    The vision tower starts here if nothing of an earlier prompt could spare its work, before the token ids are known.

    Args:
        model: Prepared for the device.
        config: How to choose tokens.
        constraint: What the answer has to follow, at its beginning; None for nothing.
        pixel_values: (images, R, R, 3), uint8; zero images for a prompt without any.
        prefix_cache: What earlier prompts left, and where this one leaves its own.
        free_tower: Whether `model` will be shown no other images: see `FastVLM.prefill`.
        on_submit: See `FastVLM.vision_features`.

    Attributes:
        reused: Tokens of the prompt whose keys and values came from the prefix cache; known after the first token.
        complete: Whether the answer fulfils its constraint with the token that `tokens` yielded last.
        logprob: Of the token that `tokens` yielded last, if the config asks for it.
    """

    def __init__(
        self,
        model: FastVLM,
        config: GenerationConfig,
        pixel_values: NDArray[np.uint8],
        *,
        constraint: Constraint | None = None,
        prefix_cache: PrefixCache | None = None,
        free_tower: bool = False,
        on_submit: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._config = agreed(config, model.group)
        self._constraint = constraint
        self._pixel_values = pixel_values
        self._prefix_cache = prefix_cache
        self._free_tower = free_tower
        self._visual_tokens: mx.array | None = None
        self.reused = 0
        self.complete = False
        self.logprob: TokenLogprob | None = None
        if prefix_cache is not None:
            prefix_cache.bind(model)
        if len(pixel_values) and (prefix_cache is None or len(prefix_cache) == 0):
            with turn():
                self._visual_tokens = model.encode_image(pixel_values, on_submit)
                mx.async_eval(self._visual_tokens)

    def tokens(self, input_ids: list[int], max_tokens: int) -> Iterator[int]:
        """The token ids of the answer, one by one, end tokens included, at most `max_tokens`.

        The first is computed together with everything that it depends on, as one graph, and read before anything else
        is done. Each later step is submitted before the one before it is read, unless it is computed at once; with a
        constraint, its logits are, and the constraint finds out what is allowed while they are computed.

        Args:
            input_ids: (T,) of the prompt, an image's as `IMAGE_TOKEN`.
            max_tokens: At least 1.

        Raises:
            CheckpointError: If the logits are NaN or infinite.
        """
        decoder = self._model.language_model
        with turn():
            sampler = Sampler(self._config, [token for token in input_ids if token != IMAGE_TOKEN], self._constraint)
            logits, cache, keep = self._prefill(input_ids)
            submitted = _choose(logits, sampler)
        first = self._read(submitted, sampler)
        try:
            yield first
        finally:
            keep()
        is_read = True
        for _ in range(1, max_tokens):
            if not is_read and decoder.steps_at_once:
                yield self._read(submitted, sampler)
                is_read = True
            with turn():
                logits = decoder(submitted[:, None], cache)[:, -1]
                if self._constraint is None:
                    following = _choose(logits, sampler)
                else:
                    mx.async_eval(logits)
            latest = None if is_read else self._read(submitted, sampler)
            if self._constraint is not None:
                with turn():
                    following = _choose(logits, sampler)
            if latest is not None:
                yield latest
            submitted, is_read = following, False
        if not is_read:
            yield self._read(submitted, sampler)

    def _read(self, submitted: mx.array, sampler: Sampler) -> int:
        (token,) = read_tokens(submitted)
        sampler.advance(token)
        self.complete = sampler.complete
        self.logprob = sampler.take_logprob()
        return token

    def score(self, input_ids: list[int], choices: Sequence[Sequence[int]]) -> list[float]:
        """The logarithm of the probability of each choice as the answer; see `fastvlm_mlx.engine.choices.score`.

        Args:
            input_ids: As in `tokens`.
            choices: The token ids of each, its end token included.

        Raises:
            CheckpointError: If the logits are NaN or infinite.
        """
        with turn():
            logits, cache, keep = self._prefill(input_ids)
            scores = score(self._model, logits, cache, choices)
        keep()
        return scores

    def _prefill(self, input_ids: list[int]) -> tuple[mx.array, list[KVCache], Callable[[], None]]:
        """Logits (1, V), the filled cache, and what keeps the prompt for later ones, to be called once it is read."""
        model, pixel_values, prefix_cache = self._model, self._pixel_values, self._prefix_cache
        num_visual_tokens = (pixel_values.shape[1] // model.config.vision_config.patch_size) ** 2
        key: PrefixKey = ()
        cache: list[KVCache] | None = None
        if prefix_cache is not None:
            key = prefix_key(input_ids, pixel_values)
            self.reused, cache = prefix_cache.match(key, num_visual_tokens)
        seen = input_ids[: self.reused].count(IMAGE_TOKEN)
        unseen = len(pixel_values) > seen
        visual_tokens = self._visual_tokens[seen:] if unseen and self._visual_tokens is not None else None
        logits, cache = model.prefill(
            input_ids[self.reused :],
            pixel_values[seen:] if unseen else None,
            cache=cache,
            visual_tokens=visual_tokens,
            free_tower=self._free_tower,
        )
        if prefix_cache is None:
            return logits, cache, lambda: None
        return logits, cache, lambda: prefix_cache.store(key, cache)


def _choose(logits: mx.array, sampler: Sampler) -> mx.array:
    """Submits the choice of a token (1,) from logits (1, V)."""
    token = sample(logits, [sampler])
    mx.async_eval(token)
    return token
