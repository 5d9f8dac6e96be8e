"""The probability of each token of an answer, and the most probable tokens in its place. Shapes: V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

from fastvlm_mlx.backend import mx
from fastvlm_mlx.streams import read


class TokenLogprob(NamedTuple):
    """How probable a token was after what came before it.

    These are the model's own probabilities, as OpenAI and vLLM report them: before biases, penalties, a schema, filters
    and temperature.

    Attributes:
        token_id: The token.
        logprob: The natural logarithm of its probability.
        top: The most probable tokens with theirs, the most probable first; the token itself need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class PendingLogprob:
    """The `TokenLogprob` of a token that the device computes.

    Args:
        logits: (1, V), of the model.
        token: (1,), the token chosen.
        count: How many alternatives to report.

    Attributes:
        arrays: What has to be submitted.
    """

    def __init__(self, logits: mx.array, token: mx.array, count: int) -> None:
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = token.astype(mx.int32)
        count = min(count, logits.shape[-1])
        ids = token
        if count:
            best = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[0, :count].astype(mx.int32)
            ids = mx.concatenate([token, best])
        self.arrays = [ids, logprobs[0, ids]]

    def read(self) -> TokenLogprob:
        """Waits for it; equally probable tokens come in the order of their ids."""
        ids, values = (read(array).tolist() for array in self.arrays)
        pairs = list(zip(ids, values, strict=True))
        return TokenLogprob(*pairs[0], tuple(sorted(pairs[1:], key=lambda pair: (-pair[1], pair[0]))))
