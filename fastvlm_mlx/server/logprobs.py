"""Probabilities of tokens: how they are asked for, and how they are shown."""

from __future__ import annotations

from typing import Any

from fastvlm_mlx.engine.logprobs import TokenLogprob
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.server.api import ApiError, Context
from fastvlm_mlx.server.fields import Fields


def read_logprobs(fields: Fields) -> int | None:
    """How many alternatives are wanted for each token; None if no probabilities are.

    Raises:
        ApiError: If alternatives are wanted without probabilities.
    """
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", least=0, most=20)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_parameter")
    return (top or 0) if wanted else None


def shown_logprobs(result: GenerationResult, context: Context) -> list[dict[str, Any]]:
    """The tokens of an answer, or of a piece of it, with their probabilities; none if none were wanted."""
    return [_shown(each, context) for each in result.logprobs]


def _shown(token: TokenLogprob, context: Context) -> dict[str, Any]:
    engine = context.service.engine
    assert engine is not None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = engine.processor.tokenizer.token_bytes(token_id, skip_special_tokens=False)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*each) for each in token.top]}
