"""Answers as text: from images and a prompt to a stream of results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastvlm_mlx.arguments import flag
from fastvlm_mlx.engine.decode import RowDecoder
from fastvlm_mlx.engine.options import GenerationConfig, GenerationOptions
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.generation.answer import Answer
from fastvlm_mlx.generation.doors import check_loaded
from fastvlm_mlx.generation.request import checked_prefix, checked_schema
from fastvlm_mlx.generation.result import GenerationResult, whole
from fastvlm_mlx.inputs.processor import FastVLMProcessor, Inputs
from fastvlm_mlx.inputs.prompts import DEFAULT_PROMPT, Prompt
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Allow, ImageSource
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.structured.grammar import Grammars
from fastvlm_mlx.structured.schemas import JsonSchema, Schema

if TYPE_CHECKING:
    from typing_extensions import Unpack


def stream_generate(
    model: FastVLM,
    processor: FastVLMProcessor,
    prompt: Prompt | None = None,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    system: str | None = None,
    resolution: Resolution = None,
    background: str | None = None,
    allow: Allow | None = None,
    config: GenerationConfig | None = None,
    schema: JsonSchema | Schema | None = None,
    prefix: str | None = None,
    prefix_cache: PrefixCache | None = None,
    free_tower: bool = False,
    **options: Unpack[GenerationOptions],
) -> Iterator[GenerationResult]:
    """Streams the answer to a prompt about one or several images, or about none.

    Each piece holds whole characters; the last one has a `finish_reason`. The vision tower starts at the call, the rest
    with the first piece.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a conversation as messages in the OpenAI shape; None asks for a description.
        image: A path, URL, `data:` URL, bytes, PIL image or array (H, W, 3), or a list of these. Its EXIF orientation
            counts, also that of a PIL image that was edited.
        system: Replaces the default system text.
        resolution: Side in pixels that images are resized to: a multiple of 64, `auto`, or None for the model's own.
        background: Colour under transparent pixels, such as `white`; by default they show what is stored in them, often
            black.
        allow: What images may refer to. By default `image` may refer to anything; a string in messages must be a
            `data:` URL or a URL of a host on the public internet.
        config: How to choose tokens, and where to stop.
        schema: The JSON that the answer has to be: a JSON schema as a dict, a class with `model_json_schema`, or
            `"json"` or True for any object; see `fastvlm_mlx.structured`.
        prefix: How the answer begins: the model goes on from there. It is part of the text, counts as prompt, and its
            tokens are those that it has alone, without spaces at its end.
        prefix_cache: Keys and values of earlier prompts: continues from the longest common beginning, and adds this
            prompt.
        free_tower: Whether the model will be shown no other images: see `FastVLM.prefill`.
        options: Fields of `GenerationConfig` that differ from `config`, such as `max_tokens=64`.

    Raises:
        ImageError: If an image is not allowed or cannot be read.
        PromptError: If the prompt is empty, malformed or does not fit the context.
        SchemaError: If answers cannot be made to follow the schema.
        ConfigError: If another argument cannot be used, or the vision tower was freed.
        FastVLMError: If the model's logits are NaN or infinite, or the process was forked from one that has used MLX.
    """
    start = time.perf_counter()
    check_loaded(model, processor, prefix_cache)
    free_tower = flag(free_tower, "free_tower")
    config = GenerationConfig.of(config, options)
    config.check_vocabulary(processor.vocab_size)
    followed = checked_schema(schema, config)
    beginning = checked_prefix(prefix, followed)
    prompt = DEFAULT_PROMPT if prompt is None else prompt
    inputs = processor.prepare(
        image,
        prompt,
        resolution=resolution,
        system=system,
        background=background,
        allow=allow,
        prefix=beginning,
    )
    prepared = time.perf_counter()
    constraint = None if followed is None else Grammars.of(processor).start(followed)
    decoder = RowDecoder(
        model,
        config,
        inputs.pixel_values,
        constraint=constraint,
        prefix_cache=prefix_cache,
        free_tower=free_tower,
        on_submit=inputs.start,
    )
    submitted = time.perf_counter()
    _ = inputs.input_ids  # tokenized here, while a GPU runs the tower
    preprocess = time.perf_counter() - submitted + prepared - start
    return _pieces(inputs, decoder, Answer(inputs, config, start=start, preprocess=preprocess))


def _pieces(inputs: Inputs, decoder: RowDecoder, answer: Answer) -> Iterator[GenerationResult]:
    for token in decoder.tokens(inputs.input_ids, answer.max_tokens):
        for piece in answer.add(token, complete=decoder.complete, logprob=decoder.logprob, reused=decoder.reused):
            yield piece
            if piece.finish_reason:
                return


def generate(
    model: FastVLM,
    processor: FastVLMProcessor,
    prompt: Prompt | None = None,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    system: str | None = None,
    resolution: Resolution = None,
    background: str | None = None,
    allow: Allow | None = None,
    config: GenerationConfig | None = None,
    schema: JsonSchema | Schema | None = None,
    prefix: str | None = None,
    prefix_cache: PrefixCache | None = None,
    free_tower: bool = False,
    **options: Unpack[GenerationOptions],
) -> GenerationResult:
    """The whole answer at once; arguments and errors are those of `stream_generate`."""
    pieces = list(
        stream_generate(
            model,
            processor,
            prompt,
            image,
            system=system,
            resolution=resolution,
            background=background,
            allow=allow,
            config=config,
            schema=schema,
            prefix=prefix,
            prefix_cache=prefix_cache,
            free_tower=free_tower,
            **options,
        )
    )
    return whole(pieces)
