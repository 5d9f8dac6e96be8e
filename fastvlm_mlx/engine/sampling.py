"""From logits to token ids, on the device. Shapes: B rows, V vocabulary."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine.constraint import Constraint, masked
from fastvlm_mlx.engine.logprobs import PendingLogprob, TokenLogprob
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.streams import read, turn

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not numbers, until the host sees it."""

_COLDEST = 1e-5
"""Temperatures below this take the most probable token: their inverse would leave float32."""

_BLUNTEST = 1e-30
"""No inverse of a temperature is less."""


class Sampler:
    """Chooses the tokens of one row, with settings, a random key and a memory of its own.

    Args:
        config: How to choose.
        prompt_ids: The text token ids of the row's prompt, which a repetition penalty counts as seen.
        constraint: What the answer has to follow, at its beginning; None for nothing.

    Attributes:
        constraint: What has to follow the tokens that it was told of.
    """

    def __init__(
        self, config: GenerationConfig, prompt_ids: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self.constraint = constraint
        self._config = config
        self._prompt_ids = list(prompt_ids)
        self._answer_ids: list[int] = []
        self._seen: mx.array | None = None
        self._counts: mx.array | None = None
        self._biases: mx.array | None = None
        self._pending: deque[PendingLogprob] = deque()
        self._key: mx.array | None = None
        if not self.is_greedy:
            seed = config.seed if config.seed is not None else int(np.random.default_rng().integers(2**63))
            self._key = mx.random.key(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most probable token."""
        return self._config.temperature < _COLDEST

    @property
    def is_argmax(self) -> bool:
        """Whether it does nothing else, so that many rows can be chosen from at once."""
        return self.is_greedy and not self._changes_logits

    @property
    def reports(self) -> bool:
        """Whether the probabilities of its tokens are wanted."""
        return self._config.logprobs is not None

    @property
    def _changes_logits(self) -> bool:
        config = self._config
        return bool(config.repetition_penalty != 1.0 or config.logit_bias or self._counts_tokens)

    @property
    def _counts_tokens(self) -> bool:
        return self._config.presence_penalty != 0.0 or self._config.frequency_penalty != 0.0

    def skip(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens that it has chosen already, with the key and the memory that they leave."""
        self._answer_ids += tokens
        for token in tokens:
            self.advance(token)
            if self._key is not None:
                self._key, _ = mx.random.split(self._key)

    def advance(self, token: int) -> None:
        """Tells the constraint which token was chosen last; has to precede the next choice."""
        if self.constraint is not None:
            self.constraint.advance(token)

    @property
    def complete(self) -> bool:
        """Whether the constraint is fulfilled, and nothing may follow."""
        return self.constraint is not None and self.constraint.complete

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token id (1,) from logits (1, V)."""
        if self._config.logit_bias:
            logits = self._biased(logits)
        if self._config.repetition_penalty != 1.0:
            logits = self._penalized(logits)
        if self._counts_tokens:
            logits = self._discouraged(logits)
        if self._key is None:
            token = mx.argmax(logits, axis=-1)
        else:
            self._key, key = mx.random.split(self._key)
            token = mx.random.categorical(self.logprobs(logits) * self._sharpness, key=key)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token[:, None], mx.array(True), axis=-1)
        if self._counts is not None:
            self._counts = self._counts.at[:, token].add(1.0)
        return token

    @property
    def _sharpness(self) -> float:
        """The inverse of the temperature; not 0 in float32, which would make ruled out tokens (-inf) no numbers."""
        return max(1 / self._config.temperature, _BLUNTEST)

    def report(self, logits: mx.array, token: mx.array) -> list[mx.array]:
        """The arrays to submit with a token (1,) from logits (1, V), so that `take_logprob` has something to read."""
        self._pending.append(PendingLogprob(logits, token, self._config.logprobs or 0))
        return self._pending[-1].arrays

    def take_logprob(self) -> TokenLogprob | None:
        """Waits for the `TokenLogprob` of the earliest token for which that was not done; None if none is wanted."""
        return self._pending.popleft().read() if self._pending else None

    def _biased(self, logits: mx.array) -> mx.array:
        if self._biases is None:
            biases = np.zeros(logits.shape, dtype=np.float32)
            biases[:, list(self._config.biases)] = list(self._config.biases.values())
            self._biases = mx.array(biases)
        return logits.astype(mx.float32) + self._biases

    def _discouraged(self, logits: mx.array) -> mx.array:
        if self._counts is None:
            counts = np.bincount(np.array(self._answer_ids, dtype=np.int64), minlength=logits.shape[-1])
            self._counts = mx.array(counts[None], mx.float32)
        config = self._config
        presence = config.presence_penalty * (self._counts > 0).astype(mx.float32)
        return logits.astype(mx.float32) - presence - config.frequency_penalty * self._counts

    def _penalized(self, logits: mx.array) -> mx.array:
        if self._seen is None:
            seen = np.zeros(logits.shape, dtype=np.bool_)
            seen[:, self._prompt_ids + self._answer_ids] = True
            self._seen = mx.array(seen)
        penalty = self._config.repetition_penalty
        return mx.where(self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)

    def logprobs(self, logits: mx.array) -> mx.array:
        """Log-probabilities (1, V) in float32 before the temperature, -inf for the tokens that are filtered out."""
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


def agreed(config: GenerationConfig, group: mx.distributed.Group | None) -> GenerationConfig:
    """The settings with a seed that all processes of a group have, where chance chooses; it is the first one's."""
    if group is None or config.seed is not None or config.temperature < _COLDEST:
        return config
    drawn = int(np.random.default_rng().integers(2**31)) if group.rank() == 0 else 0
    with turn():
        return replace(config, seed=int(mx.distributed.all_sum(mx.array(drawn), group=group)))


def sample(logits: mx.array, samplers: Sequence[Sampler]) -> mx.array:
    """The next token ids (B,) from logits (B, V): each row by its own sampler, whatever its neighbours do.

    A row gets `NO_TOKEN` if one of its logits is NaN or infinite; see `read_tokens`.
    """
    possible = masked(logits, [sampler.constraint for sampler in samplers])
    if all(sampler.is_argmax for sampler in samplers):
        tokens = mx.argmax(possible, axis=-1)
    elif len(samplers) == 1:
        tokens = samplers[0](possible)
    else:
        tokens = mx.concatenate([sampler(possible[row : row + 1]) for row, sampler in enumerate(samplers)])
    largest = mx.max(logits, axis=-1)  # NaN if any is
    chosen = mx.where(mx.abs(largest) < mx.inf, tokens.astype(mx.int32), NO_TOKEN)
    reports = [
        array
        for row, sampler in enumerate(samplers)
        if sampler.reports
        for array in sampler.report(logits[row : row + 1], tokens[row : row + 1])
    ]
    if reports:
        mx.async_eval(chosen, *reports)
    return chosen


def read_tokens(tokens: mx.array) -> list[int]:
    """Waits for token ids (B,) from `sample`.

    Raises:
        CheckpointError: If the logits of a row are NaN or infinite.
    """
    ids: list[int] = read(tokens).tolist()
    check_numbers(NO_TOKEN not in ids)
    return ids


def check_numbers(are_numbers: bool) -> None:
    """Checks what a model has computed.

    Raises:
        CheckpointError: If it is NaN or infinite.
    """
    if not are_numbers:
        raise CheckpointError(
            "the model gives no numbers (its logits are NaN or infinite): its weights are damaged, or their values "
            "leave the range of the type it computes in; try dtype='float32', compare the checkpoint with its source "
            "(fastvlm verify), and check this machine (fastvlm doctor)"
        )
