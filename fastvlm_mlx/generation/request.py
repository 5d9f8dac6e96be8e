"""Requests to an engine, and the handles to their answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.arguments import check_callable, flag, valid_text
from fastvlm_mlx.arguments import whole as whole_number
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.result import GenerationResult, whole
from fastvlm_mlx.generation.words import count_words
from fastvlm_mlx.inputs.prompts import DEFAULT_PROMPT, Prompt
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Allow, ImageSource
from fastvlm_mlx.structured.schemas import JsonSchema, Schema


def checked_schema(schema: JsonSchema | Schema | None, config: GenerationConfig) -> Schema | None:
    """What an answer has to follow; None for nothing.

    Raises:
        SchemaError: If answers cannot be made to follow it; see `Schema.of`.
        ConfigError: If the settings do not go with a schema.
    """
    followed = Schema.of(schema)
    if followed is not None and config.ignore_eos:
        raise ConfigError("with a schema, the answer ends where it is complete; leave ignore_eos out")
    return followed


def checked_prefix(prefix: str | None, schema: Schema | None) -> str:
    """What an answer begins with.

    Raises:
        PromptError: If it is no text.
        ConfigError: If there is a schema, too.
    """
    text = valid_text("" if prefix is None else prefix, "the prefix")
    if text and schema is not None:
        raise ConfigError("an answer that follows a schema begins as that demands; leave prefix out")
    return text


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One question; the fields are arguments of `fastvlm_mlx.generate`, but for `sentence`, `max_words` and `opening`.

    Attributes:
        sentence: Whether the answer ends after its first whole sentence; one within the prefix does not count.
        max_words: The most words of the answer, those of the prefix included; of Chinese and Japanese, characters.
        opening: Returns how many characters at the beginning of a text will be removed from the answer, so that their
            words do not count.
        keep_visual_tokens: Whether the handle gets the visual tokens of the images.

    Raises:
        ConfigError: If a field is of the wrong kind, the prefix leaves no room for a word, or a schema does not go with
            another field.
        PromptError: If the prefix is no text.
        SchemaError: If answers cannot be made to follow the schema.
    """

    image: ImageSource | Sequence[ImageSource] | None = None
    prompt: Prompt = DEFAULT_PROMPT
    system: str | None = None
    resolution: Resolution = None
    background: str | None = None
    allow: Allow | None = None
    config: GenerationConfig = field(default_factory=GenerationConfig)
    sentence: bool = False
    schema: JsonSchema | Schema | None = None
    prefix: str = ""
    max_words: int | None = None
    opening: Callable[[str], int] | None = None
    keep_visual_tokens: bool = False

    def __post_init__(self) -> None:
        """Replaces None by the defaults, and a schema by a `Schema`."""
        object.__setattr__(self, "prompt", DEFAULT_PROMPT if self.prompt is None else self.prompt)
        object.__setattr__(self, "config", GenerationConfig.of(self.config, {}))
        object.__setattr__(self, "sentence", flag(self.sentence, "sentence"))
        schema = checked_schema(self.schema, self.config)
        object.__setattr__(self, "schema", schema)
        if schema is not None and (self.sentence or self.max_words is not None):
            name = "sentence" if self.sentence else "max_words"
            raise ConfigError(f"an answer that follows a schema has no sentences; leave {name} out")
        object.__setattr__(self, "prefix", checked_prefix(self.prefix, schema))
        check_callable(self.opening, "opening")
        object.__setattr__(self, "keep_visual_tokens", flag(self.keep_visual_tokens, "keep_visual_tokens"))
        if self.max_words is not None:
            object.__setattr__(self, "max_words", whole_number(self.max_words, "max_words"))
            if (words := count_words(self.prefix)) >= self.max_words:
                raise ConfigError(f"the prefix has {words} of {self.max_words} words, and leaves none for the answer")


class Handle:
    """The answer to a request, as it grows. Any thread may use it, and several may.

    Iterate over it for pieces like those of `stream_generate`, or wait for its `result`.

    Args:
        request: The request.
        on_change: Called with the handle for every new piece, and when it has ended; in an engine's thread.

    Attributes:
        request: The request.
        cancelled: Whether it was cancelled.
        visual_tokens: (images, N, D), float32, from the first piece on, if the request keeps them; None if an earlier
            prompt with such an image spared the engine the vision tower.
    """

    def __init__(self, request: Request, on_change: Callable[[Handle], None] | None = None) -> None:
        self.request = request
        self.cancelled = False
        self.visual_tokens: NDArray[np.float32] | None = None
        self._on_change = on_change
        self._changed = threading.Condition()
        self._pieces: list[GenerationResult] = []
        self._error: BaseException | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether it has ended: with an answer, with an error, or cancelled."""
        return self._done

    @property
    def error(self) -> BaseException | None:
        """Why it has no whole answer, once it is done; `CancelledError` if it was cancelled."""
        return self._error

    def cancel(self) -> None:
        """Ends it at the next step, wherever it is; without effect when it is done."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is done, after waiting for that, at most `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done, timeout)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """The whole answer.

        Raises:
            TimeoutError: If it is not there after `timeout` seconds.
            CancelledError: If it was cancelled.
            FastVLMError: For the reasons of `fastvlm_mlx.generate`.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        if self._error is not None:
            raise self._error
        return whole(self._pieces)

    def since(self, seen: int) -> tuple[list[GenerationResult], bool]:
        """The pieces after the first `seen`, without waiting, and whether no more will follow."""
        with self._changed:
            return self._pieces[seen:], self._done

    def __iter__(self) -> Iterator[GenerationResult]:
        """The pieces from the first one on; errors are those of `result`."""
        seen = 0
        done = False
        while not done:
            with self._changed:
                while not self._done and len(self._pieces) == seen:
                    self._changed.wait()
            pieces, done = self.since(seen)
            yield from pieces
            seen += len(pieces)
        if self._error is not None:
            raise self._error

    def add(self, pieces: Sequence[GenerationResult]) -> None:
        """Adds pieces of the answer; for the engine."""
        with self._changed:
            self._pieces += pieces
            self._changed.notify_all()
        if self._on_change is not None:
            self._on_change(self)

    def end(self, error: BaseException | None = None) -> bool:
        """Says that nothing follows, and why; returns whether it had not ended before. For the engine."""
        with self._changed:
            if self._done:
                return False
            self._error = CancelledError() if error is None and self.cancelled and not self._is_whole else error
            self._done = True
            self._changed.notify_all()
        if self._on_change is not None:
            self._on_change(self)
        return True

    @property
    def _is_whole(self) -> bool:
        return bool(self._pieces) and self._pieces[-1].finish_reason is not None
