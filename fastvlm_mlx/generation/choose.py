"""Given answers, each with the probability that the model gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastvlm_mlx.arguments import check_choices
from fastvlm_mlx.engine.decode import RowDecoder
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.generation.doors import check_loaded
from fastvlm_mlx.generation.result import Choice
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.prompts import Prompt
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Allow, ImageSource
from fastvlm_mlx.inputs.tokenizer_files import IM_END
from fastvlm_mlx.model.fastvlm import FastVLM


def choose(
    model: FastVLM,
    processor: FastVLMProcessor,
    choices: Sequence[str],
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt: Prompt,
    system: str | None = None,
    resolution: Resolution = None,
    background: str | None = None,
    allow: Allow | None = None,
    prefix_cache: PrefixCache | None = None,
) -> list[Choice]:
    """The choices, in their order, with the probability of each as the answer; nothing is sampled.

        choose(model, processor, ["yes", "no"], image="photo.jpg", prompt="Is there a dog?")

    Args:
        model: From `load`.
        processor: From `load`.
        choices: At least two different answers, as the model would write them: `yes` is not `Yes.`.
        image: As in `generate`, like all that follow.
        prompt: The question.
        system: Replaces the default system text.
        resolution: Side in pixels.
        background: Colour under transparent pixels.
        allow: What images may refer to.
        prefix_cache: Keys and values of earlier prompts.

    Raises:
        PromptError: If there are fewer than two choices, or one is empty or occurs twice, or with the errors of
            `generate`.
        ImageError: As in `generate`.
        ConfigError: As in `generate`.
    """
    check_loaded(model, processor, prefix_cache)
    check_choices(choices)
    sequences = [_tokens(processor, choice) for choice in choices]
    inputs = processor.prepare(image, prompt, resolution=resolution, system=system, background=background, allow=allow)
    decoder = RowDecoder(
        model, GenerationConfig(), inputs.pixel_values, prefix_cache=prefix_cache, on_submit=inputs.start
    )
    room = processor.context_length - processor.positions(inputs.input_ids, inputs.resolution)
    longest = max(map(len, sequences))
    if longest > room:
        raise PromptError(f"a choice takes {longest} tokens but the context has room for {room} after the prompt")
    logprobs = decoder.score(inputs.input_ids, sequences)
    lengths = [len(sequence) for sequence in sequences]
    means = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
    rows = zip(choices, shares(logprobs), shares(means), logprobs, lengths, strict=True)
    return [
        Choice(text=text, probability=probability, corrected=corrected, logprob=logprob, tokens=length)
        for text, probability, corrected, logprob, length in rows
    ]


def _tokens(processor: FastVLMProcessor, choice: str) -> list[int]:
    """The token ids of an answer, with the token that ends it."""
    return [*processor.tokenizer.encode(choice), processor.tokenizer.token_id(IM_END)]


def shares(logarithms: Sequence[float]) -> list[float]:
    """Numbers proportional to the exponentials of `logarithms`, which sum to 1."""
    largest = max(logarithms)
    weights = [math.exp(value - largest) for value in logarithms]
    return [weight / sum(weights) for weight in weights]
