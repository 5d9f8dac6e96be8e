"""Who answers in a conversation: the background server where it can, else a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.warm.client import Holding, Listener, Silent, Warm, WarmLostError, find_warm
from fastvlm_mlx.warm.wire import Question, Size

if TYPE_CHECKING:
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.inputs.sources import Encoded
    from fastvlm_mlx.inputs.turned import TurnedImage


class Answerer(Protocol):
    """Answers questions, and keeps the keys and values of what it has seen."""

    def ask(self, question: Question, listener: Listener) -> Iterator[GenerationResult]:
        """The pieces of an answer; what is left of it is cancelled when the iteration ends early.

        Raises:
            FastVLMError: If the question cannot be answered.
        """

    def measure(self, question: Question) -> Size:
        """The room that a question takes.

        Raises:
            FastVLMError: If it cannot be answered.
        """


class Here:
    """A model in this process, loaded with the first question.

    Args:
        load: Makes the engine.
        slow: What there is to say about a slow machine, once.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = None
        self._images: dict[tuple[int, str | None], tuple[Encoded, TurnedImage]] = {}

    def start(self) -> Engine:
        """The engine, loaded now if it was not."""
        if self._engine is None:
            self._engine = self._load()
        return self._engine

    def ask(self, question: Question, listener: Listener) -> Iterator[GenerationResult]:
        """See `Answerer`."""
        from fastvlm_mlx.backend import mx
        from fastvlm_mlx.generation.request import Request

        engine = self.start()
        images = self._opened(question, listener)
        listener.seen()
        request = Request(
            image=images or None,
            prompt=question.prompt,
            system=question.system,
            resolution=question.resolution,
            config=question.config,
        )
        handle = engine.submit(request)
        try:
            for piece in handle:
                listener.peak_memory = mx.get_peak_memory()
                yield piece
        finally:
            handle.cancel()
            if not handle.done:
                handle.wait()

    def measure(self, question: Question) -> Size:
        """See `Answerer`."""
        processor = self.start().processor
        images = self._opened(question, Silent())
        tokens, visual = processor.measure(
            images, question.prompt, resolution=question.resolution, system=question.system
        )
        return Size(prompt_tokens=tokens, visual_tokens=visual, context_length=processor.context_length)

    def _opened(self, question: Question, listener: Listener) -> list[Any]:
        """The images of a question, each decoded once."""
        from fastvlm_mlx.inputs.images import load_turned

        opened = {}
        for encoded in question.images:
            key = id(encoded), question.background
            if key not in self._images:
                image = load_turned(encoded, background=question.background, notify=listener.transparent)
                self._images[key] = encoded, image
            opened[key] = self._images[key]
        self._images = opened
        return [self._images[id(encoded), question.background][1] for encoded in question.images]


class Best:
    """The background server if it holds the model, or another answerer from the moment on that it does not.

    Args:
        holding: The model.
        here: Answers where the server does not.
        warm: Whether to use the server at all.

    Attributes:
        server: The server that gave the last answer; None if it was this process.
    """

    def __init__(self, holding: Holding, here: Here, *, warm: bool) -> None:
        self._here = here
        self.server: Warm | None = find_warm(holding) if warm else None

    def ask(self, question: Question, listener: Listener) -> Iterator[GenerationResult]:
        """See `Answerer`; a server that goes away before it has said anything is not missed."""
        if self.server is not None:
            begun = False
            try:
                for piece in self.server.ask(question, listener):
                    begun = begun or bool(piece.text)
                    yield piece
                return
            except WarmLostError:
                self.server = None
                if begun:
                    raise
        yield from self._here.ask(question, listener)

    def measure(self, question: Question) -> Size:
        """See `Answerer`."""
        if self.server is not None:
            with suppress(WarmLostError):
                return self.server.measure(question)
            self.server = None
        return self._here.measure(question)
