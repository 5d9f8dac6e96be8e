"""Answers, and the statistics that they carry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvlm_mlx.engine.logprobs import TokenLogprob


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds that the parts of an answer took.

    Attributes:
        preprocess: From images and prompt to arrays.
        ttft: From the call to the first token on the host, `preprocess` included.
        decode: From the first token to the latest.
        total: From the call to the latest token.
        queue: Of `ttft`, what the request waited for others in an `Engine`.
    """

    preprocess: float
    ttft: float
    decode: float
    total: float
    queue: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """An answer, or one piece of it as it is streamed.

    Attributes:
        text: The answer's text, which begins with the `prefix`; of a piece, what is new since the piece before.
        token_ids: The ids generated, without the end token; of a piece, those since the piece before. Text that a stop
            string cut off still has its ids here.
        logprobs: How probable the model found each of `token_ids`, as (token_id, logprob, top); empty unless
            `GenerationConfig.logprobs` asks for it.
        prompt_tokens: Positions of the prompt; an image counts as its visual tokens.
        visual_tokens: How many of those are images.
        reused_tokens: How many of those came from a `PrefixCache`.
        generated_tokens: Tokens generated so far, the end token included.
        finish_reason: `stop` (an end token or a stop string), `length`, or None while streaming.
        stop_string: The stop string that ended it; None if an end token or a sentence did, or nothing has.
        timings: Seconds so far.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    reused_tokens: int = 0
    generated_tokens: int
    finish_reason: str | None
    stop_string: str | None = None
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed without the first token; 0 before there is a second one."""
        return (self.generated_tokens - 1) / self.timings.decode if self.generated_tokens > 1 else 0.0


def whole(pieces: list[GenerationResult]) -> GenerationResult:
    """The pieces of an answer as one result."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the answers that a question offers.

    Attributes:
        text: The answer.
        probability: That the model gives it rather than one of the others; those of all choices sum to 1.
        corrected: The same with the geometric mean of its tokens' probabilities, which favours no short answer.
        logprob: The logarithm of the probability of exactly this answer, among all that the model could give.
        tokens: The number of its tokens, the end token included.
    """

    text: str
    probability: float
    corrected: float
    logprob: float
    tokens: int
