"""Answers on their way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import replace

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.request import Handle
from fastvlm_mlx.generation.result import GenerationResult, whole
from fastvlm_mlx.server.api import ApiError

log = logging.getLogger(__name__)


class Answering:
    """Answers on their way, for the event loop that is running.

    Attributes:
        handles: One for each request.
    """

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._cut: Exception | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return all(handle.done and handle.error is None for handle in self.handles)

    def wake(self, _: Handle) -> None:
        """Lets `pieces` look again; from any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._changed.set)

    def cancel(self) -> None:
        """Ends all that is not done, at the next step."""
        for handle in self.handles:
            handle.cancel()

    def fail(self, error: Exception) -> None:
        """Ends all that is not done, and lets `pieces` raise an error."""
        self._error = self._error or error
        self.cancel()
        self._changed.set()

    def cut(self, late: Exception) -> None:
        """Ends all that is not done as if its last token had come; `pieces` raises `late` for what has none."""
        self._cut = late
        self.cancel()
        self._changed.set()

    async def pieces(self) -> AsyncGenerator[tuple[int, GenerationResult], None]:
        """The pieces of all answers as they come, each with its request's place; those that are late come as one.

        Raises:
            FastVLMError: If one cannot be given.
            Exception: What `fail` was called with.
        """
        latest: dict[int, GenerationResult] = {}
        seen = dict.fromkeys(range(len(self.handles)), 0)
        while seen:
            self._changed.clear()
            for number in list(seen):
                pieces, done = self.handles[number].since(seen[number])
                seen[number] += len(pieces)
                if pieces:
                    latest[number] = whole(pieces)
                    yield number, latest[number]
                if self._error is not None:
                    raise self._error
                if done or self._cut is not None:
                    del seen[number]
                    if latest.get(number) is None or latest[number].finish_reason is None:
                        yield number, self._ended(self.handles[number], latest.get(number))
            if seen:
                await self._changed.wait()

    def _ended(self, handle: Handle, latest: GenerationResult | None) -> GenerationResult:
        """The last piece of an answer that was cut.

        Raises:
            ApiError: If the answer ended for another reason.
            Exception: What `cut` was called with, if there was no piece before.
            FastVLMError: If it cannot be given.
        """
        error = handle.error
        if isinstance(error, FastVLMError):
            raise error
        if self._cut is not None:
            if latest is None:
                raise self._cut
            return replace(latest, text="", token_ids=(), logprobs=(), finish_reason="length")
        if error is None or handle.cancelled:
            raise ApiError(503, "the server is stopping", kind="server_error", code="unavailable")
        log.error("an answer failed: %s", type(error).__name__, exc_info=error)
        raise ApiError(500, f"{type(error).__name__}; the server's log says where", kind="server_error", code="bug")


async def collect(pieces: AsyncIterator[tuple[int, GenerationResult]], count: int) -> list[GenerationResult]:
    """The whole answers that the pieces of `count` requests make."""
    collected: list[list[GenerationResult]] = [[] for _ in range(count)]
    async for number, piece in pieces:
        collected[number].append(piece)
    return [whole(each) for each in collected]
