"""Rows decoded together, each as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.options import GenerationConfig, GenerationOptions
from fastvlm_mlx.engine.sampling import Sampler, sample
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.model.fastvlm import FastVLM, TokenIds
from fastvlm_mlx.streams import read, turn

if TYPE_CHECKING:
    from typing_extensions import Unpack


def generate_rows(
    model: FastVLM,
    input_ids: TokenIds,
    pixel_values: npt.ArrayLike | mx.array | None = None,
    attention_mask: npt.ArrayLike | mx.array | None = None,
    *,
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    **options: Unpack[GenerationOptions],
) -> list[list[int]]:
    """The new token ids of each row, without the end token.

    A row has its own settings, random key and limit, so its answer is the one that it gets alone. A row that has ended
    leaves the batch; one whose prompt leaves less room in the context than `max_tokens` ends with the context.

    Args:
        model: Prepared for the device.
        input_ids: As in `FastVLM.embed`.
        pixel_values: As in `FastVLM.embed`.
        attention_mask: As in `FastVLM.embed`.
        config: How to choose tokens: for all rows, or one for each.
        options: Fields of `GenerationConfig` that differ from `config`.

    Raises:
        ConfigError: If the configs and rows differ in number, a value is out of range, or there are stop strings.
        PromptError: If a prompt does not fit the context, or for the reasons of `FastVLM.embed`.
    """
    rows = model.rows(input_ids, attention_mask)
    configs = list(config) if isinstance(config, Sequence) else [config] * len(rows)
    if len(configs) != len(rows):
        raise ConfigError(f"{len(configs)} configs for {len(rows)} rows; give one for each, or one for all")
    configs = [GenerationConfig.of(each, dict(options)) for each in configs]
    if any(each.stop for each in configs):
        raise ConfigError("stop strings are about text, and this returns token ids; use fastvlm_mlx.generate")
    context = model.config.context_length
    lengths = [_positions(model, row, pixel_values) for row in rows]
    for number, length in enumerate(lengths):
        if length >= context:
            raise PromptError(f"the prompt of row {number} takes {length} positions but the context has {context}")
    limits = [min(each.max_tokens, context - length) for each, length in zip(configs, lengths, strict=True)]
    ends = [() if each.ignore_eos else model.config.eos_token_id for each in configs]
    with turn():
        samplers = [Sampler(each, row[row >= 0].tolist()) for each, row in zip(configs, rows, strict=True)]
        logits, cache = model.prefill(input_ids, pixel_values, attention_mask)
        submitted = sample(logits, samplers)
        mx.async_eval(submitted)
    answers: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    while True:
        ahead = None
        if any(len(answers[row]) + 1 < limits[row] for row in active):
            with turn():
                logits = model.language_model(submitted[:, None], cache)[:, -1]
                ahead = sample(logits, [samplers[row] for row in active])
                mx.async_eval(ahead)
        places = []
        for place, (row, token) in enumerate(zip(active, read(submitted).tolist(), strict=True)):
            if token not in ends[row]:
                answers[row].append(token)
                if len(answers[row]) < limits[row]:
                    places.append(place)
        if not places or ahead is None:
            return answers
        submitted = ahead
        if len(places) < len(active):
            active = [active[place] for place in places]
            with turn():
                submitted = ahead[mx.array(places)]
                for layer in cache:
                    layer.filter(places)


def _positions(model: FastVLM, row: npt.NDArray[np.int32], pixel_values: Any) -> int:
    """L, the positions that a row of token ids takes."""
    images = int((row == IMAGE_TOKEN).sum())
    if not images or pixel_values is None:
        return len(row)
    side: int = np.shape(pixel_values)[1] // model.config.vision_config.patch_size
    return len(row) + images * (side**2 - 1)
