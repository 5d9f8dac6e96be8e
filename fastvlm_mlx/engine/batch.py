"""Rows decoded together, each as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.arguments import check_kind, items
from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.options import GenerationConfig, GenerationOptions
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.model.fastvlm import FastVLM, TokenIds
from fastvlm_mlx.model.inputs import check_pixels
from fastvlm_mlx.streams import check_process, turn

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
        CheckpointError: If the logits of a row are NaN or infinite.
    """
    check_process()
    check_kind(model, "model", FastVLM, "a FastVLM")
    prompts = model.rows(input_ids, attention_mask)
    if config is None or isinstance(config, GenerationConfig):
        each_config = [config] * len(prompts)
    else:
        each_config = items(config, "config", "a GenerationConfig or a list of them")
    if len(each_config) != len(prompts):
        raise ConfigError(f"{len(each_config)} configs for {len(prompts)} rows; give one for each, or one for all")
    configs = [GenerationConfig.of(each, options) for each in each_config]
    for each in configs:
        each.check_vocabulary(model.config.text_config.vocab_size)
    if any(each.stop for each in configs):
        raise ConfigError("stop strings are about text, and this returns token ids; use fastvlm_mlx.generate")
    pixels = _pixels(pixel_values)
    if pixels.ndim != 4:
        raise ConfigError(f"pixel_values must be (images, R, R, 3), not {pixels.shape}")
    images = [int((prompt == IMAGE_TOKEN).sum()) for prompt in prompts]
    if sum(images) != len(pixels):
        raise PromptError(f"images given: {len(pixels)}, places for them in the prompt: {sum(images)}; they must agree")
    visual_tokens = (pixels.shape[1] // model.config.vision_config.patch_size) ** 2
    rows = []
    for number, (prompt, each) in enumerate(zip(prompts, configs, strict=True)):
        room = model.config.context_length - len(prompt) - images[number] * (visual_tokens - 1)
        if room <= 0:
            context = model.config.context_length
            raise PromptError(
                f"the prompt of row {number} takes {context - room} positions but the context has {context}"
            )
        shown = pixels[sum(images[:number]) : sum(images[: number + 1])]
        ends = () if each.ignore_eos else model.config.eos_token_id
        rows.append(Row(prompt.tolist(), shown, each, max_tokens=min(each.max_tokens, room), end_tokens=ends))
    scheduler = Scheduler(model, max_rows=len(rows))
    scheduler.add(rows)
    while scheduler.is_busy:
        scheduler.step()
    for row in rows:
        if row.error is not None:
            raise row.error
    return [[token for token in row.tokens if token not in row.end_tokens] for row in rows]


def _pixels(pixel_values: npt.ArrayLike | mx.array | None) -> npt.NDArray[Any]:
    """Pixel values (images, R, R, 3) as NumPy has them.

    Raises:
        ConfigError: If these are none.
    """
    if pixel_values is None:
        return np.zeros((0, 0, 0, 3), dtype=np.uint8)
    with turn():
        pixels = check_pixels(pixel_values)
        values = np.asarray(pixels if pixels.dtype == mx.uint8 else pixels.astype(mx.float32))
    if values.shape[1] != values.shape[2]:
        raise ConfigError(f"pixel_values must be square, (images, R, R, 3), not {values.shape}")
    return values
