"""Reads how an answer is generated from a request, in whatever words its API has for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.server.api import ApiError, Context
from fastvlm_mlx.server.fields import Fields

MOST_STOP_STRINGS = 16
LARGEST_SEED = 2**64 - 1
LONGEST_ID = 9
"""Digits of a token id."""


def read_config(
    fields: Fields,
    context: Context,
    *,
    limits: Sequence[str] = ("max_tokens", "max_completion_tokens"),
    names: Mapping[str, str] | None = None,
    **more: Any,
) -> GenerationConfig:
    """The settings of a request; what it leaves out has the server's default.

    Args:
        fields: The object that has them.
        context: The request.
        limits: What the API calls the length of an answer; of several that are given, the least counts.
        names: What the API calls other settings, by our names: `{"stop": "stop_sequences"}`.
        more: Other fields of `GenerationConfig`.

    Raises:
        ApiError: If a value is of the wrong kind or out of range.
    """
    names = names or {}
    most = context.settings.max_tokens
    given = [limit for name in limits if (limit := _limit(fields, name)) is not None]
    seed = fields.whole(names.get("seed", "seed"), least=-1, most=LARGEST_SEED)
    temperature = fields.number(
        names.get("temperature", "temperature"), context.settings.temperature, least=0.0, most=100.0
    )
    top_p = fields.number(names.get("top_p", "top_p"), 1.0, least=0.0, most=1.0)
    top_k = fields.whole(names.get("top_k", "top_k"), 0, least=-1)
    return GenerationConfig(
        max_tokens=min([*given, most]),
        temperature=temperature or 0.0,
        top_p=top_p or 1e-9,  # 0 means the most probable token
        top_k=max(top_k or 0, 0),  # -1 is vLLM's word for all
        min_p=fields.number(names.get("min_p", "min_p"), 0.0, least=0.0, most=1.0) or 0.0,
        repetition_penalty=_penalty(fields, names.get("repetition_penalty", "repetition_penalty")),
        presence_penalty=fields.number("presence_penalty", 0.0, least=-2.0, most=2.0) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", 0.0, least=-2.0, most=2.0) or 0.0,
        logit_bias=_logit_bias(fields),
        seed=None if seed == -1 else seed,
        ignore_eos=fields.flag("ignore_eos"),
        stop=fields.texts(names.get("stop", "stop"), MOST_STOP_STRINGS),
        **more,
    )


def without_effect(config: GenerationConfig, count: int = 1) -> list[str]:
    """The settings that change nothing, since the most probable token is taken each time; for warnings."""
    if config.temperature:
        return []
    settings = {"top_p": config.top_p < 1, "top_k": config.top_k, "min_p": config.min_p, "n": count > 1}
    names = [name for name, given in {**settings, "seed": config.seed is not None}.items() if given]
    return [f"{name} (the temperature is 0)" for name in names]


def _limit(fields: Fields, name: str) -> int | None:
    """The length of an answer; None for no limit, which some clients write as -1."""
    if fields.value(name) == -1:
        return None
    return fields.whole(name, least=1)


def _logit_bias(fields: Fields) -> dict[int, float]:
    """Biases by token id; `GenerationConfig` checks their range."""
    biases = fields.object("logit_bias")
    if biases is None:
        return {}
    values: dict[int, float] = {}
    for name in biases:
        if not name.isdecimal() or len(name) > LONGEST_ID:
            raise fields.wrong("logit_bias", "an object with token ids as keys")
        values[int(name)] = biases.number(name, 0.0, least=-100.0, most=100.0) or 0.0
    return values


def _penalty(fields: Fields, name: str) -> float:
    value = fields.number(name, 1.0, least=0.0, most=100.0)
    if not value:
        raise ApiError(400, f"{name} must be above 0", param=name, code="invalid_parameter")
    return value
