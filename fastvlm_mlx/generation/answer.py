"""The text of an answer, token by token, with its statistics."""

import time
from collections.abc import Callable
from dataclasses import replace

from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.logprobs import TokenLogprob
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.generation.stop import TextStream
from fastvlm_mlx.inputs.processor import Inputs


class Answer:
    """Turns the tokens of an answer into the pieces that it is streamed in.

    Args:
        inputs: The prompt.
        config: How its tokens are chosen, and where it stops.
        start: When it was asked, a time of `time.perf_counter`.
        preprocess: Seconds from images and prompt to arrays.
        sentence: Whether the answer ends after its first sentence.
        max_words: How many words end it.
        opening: See `Request`.

    Attributes:
        max_tokens: The most tokens of the answer, within the context.
        end_tokens: The ids that end it.

    Raises:
        PromptError: If the prompt is too long.
    """

    def __init__(
        self,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        start: float,
        preprocess: float,
        sentence: bool = False,
        max_words: int | None = None,
        opening: Callable[[str], int] | None = None,
    ) -> None:
        processor, input_ids = inputs.processor, inputs.input_ids
        prompt_tokens = processor.positions(input_ids, inputs.resolution)
        self.max_tokens = min(config.max_tokens, processor.context_length - prompt_tokens)
        self.end_tokens = () if config.ignore_eos else processor.eos_token_ids
        self._inputs = inputs
        self._start = start
        self._first = 0.0
        self._text = TextStream(
            processor.detokenizer(),
            config.stop_strings,
            sentence=sentence,
            max_words=max_words,
            opening=opening,
            prefix=inputs.prefix,
        )
        self._piece = GenerationResult(
            text="",
            token_ids=(),
            prompt_tokens=prompt_tokens,
            visual_tokens=input_ids.count(IMAGE_TOKEN) * processor.num_visual_tokens(inputs.resolution),
            generated_tokens=0,
            finish_reason=None,
            timings=Timings(preprocess=preprocess, ttft=0.0, decode=0.0, total=0.0),
        )

    def add(
        self,
        token: int,
        *,
        complete: bool = False,
        logprob: TokenLogprob | None = None,
        reused: int = 0,
        joined: float | None = None,
    ) -> list[GenerationResult]:
        """The pieces that a token brings; the last one of an answer has a `finish_reason`.

        Args:
            token: The next id.
            complete: Whether nothing can follow it, because the answer fulfils its schema.
            logprob: How probable it was, if that was asked.
            reused: Tokens of the prompt whose keys and values came from a prefix cache.
            joined: When the prompt began to be computed, if it had to wait for others.
        """
        now = time.perf_counter()
        piece, inputs = self._piece, self._inputs
        if not piece.generated_tokens:
            self._first = now
            known = inputs.processor.positions(inputs.input_ids[:reused], inputs.resolution)
            waited = 0.0 if joined is None else joined - self._start - piece.timings.preprocess
            piece = replace(piece, reused_tokens=known, timings=replace(piece.timings, queue=waited))
        timings = replace(
            piece.timings, ttft=self._first - self._start, decode=now - self._first, total=now - self._start
        )
        self._piece = piece = replace(piece, generated_tokens=piece.generated_tokens + 1, timings=timings)
        if token in self.end_tokens:
            return [self._last("stop")]
        text, ended = self._text.add(token)
        piece = replace(piece, text=text, token_ids=(token,), logprobs=() if logprob is None else (logprob,))
        if ended:
            return [replace(piece, finish_reason="stop", stop_string=self._text.stop_string)]
        pieces = [piece]
        if complete or piece.generated_tokens == self.max_tokens:
            pieces.append(self._last("stop" if complete else "length"))
        return pieces

    def _last(self, reason: str) -> GenerationResult:
        text, ended = self._text.finish()
        stop = self._text.stop_string
        return replace(self._piece, text=text, finish_reason="stop" if ended else reason, stop_string=stop)
