"""Answers as text: from images and a prompt to a stream of results that carry their own statistics."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.decode import Sampler, SamplingConfig, decode
from fastvlm_mlx.engine.prefix_cache import prefix_key
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.inputs.images import ImageSource
from fastvlm_mlx.inputs.processor import FastVLMProcessor, Resolution
from fastvlm_mlx.inputs.prompts import Prompt
from fastvlm_mlx.model.fastvlm import FastVLM

DEFAULT_PROMPT = "Describe the image."
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """An answer, or one piece of it as it is streamed.

    Attributes:
        text: The answer's text; of a piece, what is new since the piece before.
        token_ids: The ids generated, without the end token; of a piece, those since the piece before. Text that a stop
            string cut off still has its ids here.
        prompt_tokens: Positions of the prompt; an image counts as its visual tokens.
        visual_tokens: Those among them that are images.
        reused_tokens: Those that an earlier prompt of the same model began with, which were not computed again.
        generated_tokens: Tokens generated so far, the end token included.
        finish_reason: `stop` (an end token or a stop string), `length`, or None while streaming.
        timings: Seconds by stage: `preprocess` (images and prompt to arrays), `ttft` (from the call to the first token
            on the host, `preprocess` included), `decode` (from there to the latest token) and `total`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    reused_tokens: int = 0
    generated_tokens: int
    finish_reason: str | None
    timings: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed without the first token; 0 before there is a second one."""
        return (self.generated_tokens - 1) / self.timings["decode"] if self.generated_tokens > 1 else 0.0


class StopStrings:
    """Ends a stream of text before the first stop string, holding back what may be the beginning of one.

    Raises:
        PromptError: If a stop string is empty.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self._stop):
            raise PromptError("a stop string is empty; every answer would end at once")
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What of the stream can be shown after `text` was added to it, and whether it has ended."""
        text = self._held + text
        ends = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream_generate(
    model: FastVLM,
    processor: FastVLMProcessor,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt: Prompt = DEFAULT_PROMPT,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    resolution: Resolution = None,
    reuse: bool = True,
    last_images: bool = False,
) -> Iterator[GenerationResult]:
    """Streams the answer to a prompt about one or several images, or about none.

    Each piece holds whole characters; the last one has a `finish_reason`.

    Args:
        model: From `load`.
        processor: From `load`.
        image: A path, URL, `data:` URL, bytes, PIL image or array (H, W, 3), or a list of these.
        prompt: A question, or a conversation as messages in the OpenAI shape.
        max_tokens: The answer's length at most; less where the context ends before.
        temperature: See `SamplingConfig`, also for the following ones.
        top_p: See there.
        top_k: See there.
        min_p: See there.
        repetition_penalty: See there.
        seed: See there.
        stop: Strings that end the answer and are not part of it.
        system: Replaces the default system text.
        resolution: Side in pixels that images are resized to: a multiple of 64, `auto`, or None for the model's own.
        reuse: Whether to continue from what an earlier prompt with the same beginning left in `model.prefixes`.
        last_images: Whether the model will be shown no others: see `FastVLM.prefill`.

    Raises:
        ImageError: If an image cannot be read.
        PromptError: If the prompt is empty, malformed or does not fit the context.
        ConfigError: If a sampling argument or the resolution cannot be used.
    """
    start = time.perf_counter()
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
    sampling = SamplingConfig(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    stop_strings = StopStrings(stop)
    conversations, pixel_values = processor.prepare(image, prompt, resolution=resolution, system=system)
    prepared = encoded = time.perf_counter()
    visual_tokens = None
    if len(pixel_values) and not (reuse and len(model.prefixes)):
        # No earlier prompt can spare the tower its work, so it need not wait for the tokens, nor for their tokenizer.
        visual_tokens = model.encode_image(pixel_values, meanwhile=processor.tokenizer.start)
        mx.async_eval(visual_tokens)
        encoded = time.perf_counter()
    input_ids = processor.tokenize(conversations, pixel_values)["input_ids"][0].tolist()
    preprocess = time.perf_counter() - encoded + prepared - start
    question = _Question(input_ids, pixel_values, visual_tokens, preprocess, start)
    return _stream(model, processor, question, sampling, stop_strings, max_tokens, reuse, last_images)


class _Question(NamedTuple):
    """A prompt as arrays.

    Attributes:
        input_ids: (T,)
        pixel_values: (images, R, R, 3)
        visual_tokens: (images, N, D), where they are being computed already.
        preprocess: Seconds that the arrays have taken.
        start: When it was asked, by `time.perf_counter`.
    """

    input_ids: list[int]
    pixel_values: NDArray[np.uint8]
    visual_tokens: mx.array | None
    preprocess: float
    start: float


def _stream(
    model: FastVLM,
    processor: FastVLMProcessor,
    question: _Question,
    sampling: SamplingConfig,
    stop: StopStrings,
    max_tokens: int,
    reuse: bool,
    last_images: bool,
) -> Iterator[GenerationResult]:
    prompt_ids, resolution = question.input_ids, question.pixel_values.shape[1]
    prompt_tokens, per_image = processor.positions(prompt_ids, resolution), processor.visual_tokens(resolution)
    sampler = Sampler(sampling, [[token for token in prompt_ids if token != IMAGE_TOKEN]])
    key = prefix_key(prompt_ids, question.pixel_values)
    reused, cache = model.prefixes.match(key, per_image) if reuse else (0, None)
    seen = prompt_ids[:reused].count(IMAGE_TOKEN)
    unseen = len(question.pixel_values) > seen
    logits, cache = model.prefill(
        prompt_ids[reused:],
        question.pixel_values[seen:] if unseen else None,
        cache=cache,
        visual_tokens=question.visual_tokens[seen:] if unseen and question.visual_tokens is not None else None,
        last_images=last_images,
    )
    prompt_cache = [layer.snapshot() for layer in cache]
    steps = decode(
        model.language_model, logits, cache, sampler, min(max_tokens, processor.context_length - prompt_tokens)
    )
    detokenizer, first = processor.detokenizer(), 0.0
    piece = GenerationResult(
        text="",
        token_ids=(),
        prompt_tokens=prompt_tokens,
        visual_tokens=prompt_ids.count(IMAGE_TOKEN) * per_image,
        reused_tokens=processor.positions(prompt_ids[:reused], resolution),
        generated_tokens=0,
        finish_reason=None,
        timings={},
    )

    def elapsed() -> dict[str, float]:
        now, start = time.perf_counter(), question.start
        timings = {"preprocess": question.preprocess, "ttft": first - start}
        return {**timings, "decode": now - first, "total": now - start}

    for count, tokens in enumerate(steps, start=1):
        token = int(np.asarray(tokens)[0])
        if count == 1:
            first = time.perf_counter()
            if reuse:
                model.prefixes.store(key, prompt_cache)
            del prompt_cache
        piece = replace(piece, generated_tokens=count, timings=elapsed())
        if token in processor.eos_token_ids:
            break
        text, ended = stop.add(detokenizer.add(token))
        if ended:
            yield replace(piece, text=text, token_ids=(token,), finish_reason="stop")
            return
        yield replace(piece, text=text, token_ids=(token,))
    else:
        token = -1
    text, ended = stop.add(detokenizer.finish())
    reason = "stop" if ended or token in processor.eos_token_ids else "length"
    yield replace(piece, text=text if ended else text + stop.finish(), finish_reason=reason, timings=elapsed())


def generate(
    model: FastVLM,
    processor: FastVLMProcessor,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    prompt: Prompt = DEFAULT_PROMPT,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    resolution: Resolution = None,
    reuse: bool = True,
    last_images: bool = False,
) -> GenerationResult:
    """The whole answer at once; arguments and errors are those of `stream_generate`."""
    pieces = list(
        stream_generate(
            model,
            processor,
            image=image,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            system=system,
            resolution=resolution,
            reuse=reuse,
            last_images=last_images,
        )
    )
    text = "".join(piece.text for piece in pieces)
    return replace(pieces[-1], text=text, token_ids=tuple(token for piece in pieces for token in piece.token_ids))
