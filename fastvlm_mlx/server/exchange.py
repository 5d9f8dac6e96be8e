"""One request over HTTP: its body is read, its question asked, and the answer sent whole or piece by piece."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from fastvlm_mlx.errors import FastVLMError, ImageError, PromptError, SchemaError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.schema import parse_object
from fastvlm_mlx.server.answering import Answering, collect
from fastvlm_mlx.server.api import Api, ApiError, Context, Question
from fastvlm_mlx.server.guard import log_error
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings

log = logging.getLogger(__name__)

MOST_WARNINGS = 100
"""That are remembered, so as not to be logged again."""
MOST_LEVELS = 64
"""The most objects and lists within each other in a request."""
_CODES: dict[type[FastVLMError], str] = {
    ImageError: "invalid_image",
    PromptError: "invalid_prompt",
    SchemaError: "invalid_schema",
}


class Exchange:
    """Answers the requests to one API; an ASGI application.

    Args:
        api: What is spoken.
        service: What answers.
        settings: What is allowed.
    """

    def __init__(self, api: Api, service: Service, settings: Settings) -> None:
        self._api = api
        self._service = service
        self._settings = settings
        self._warned: set[tuple[str, ...]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        context = Context.of(self._service, self._settings)
        reply = Reply(send, self._settings.send_seconds, context)
        api = self._api
        async with (
            refusing(scope, reply, body=api.error, broken=api.broken, media_type=api.media_type),
            AsyncExitStack() as stack,
        ):
            await self._answer(receive, reply, context, stack)

    async def _answer(self, receive: Receive, reply: Reply, context: Context, stack: AsyncExitStack) -> None:
        self._service.check_ready()
        body = await read_body(receive)
        question = await self._service.in_thread(self._read, body, context)
        del body
        reply.warnings = question.warnings
        self._warn(question.warnings)
        self._service.check(question.model)
        if not question.requests:
            await reply.json(200, self._api.whole(question, [], context))
            return
        answering = self._service.submit(question.requests)
        stack.callback(self._service.leave, answering)
        watching = asyncio.create_task(_watch(receive, answering))
        stack.callback(watching.cancel)
        pieces = await stack.enter_async_context(aclosing(self._pieces(answering, context)))
        if question.stream:
            await self._stream(question, pieces, context, reply)
        else:
            results = await collect(pieces, len(question.requests))
            await reply.json(200, self._api.whole(question, results, context))

    def _read(self, body: bytearray, context: Context) -> Question:
        values = parse_object(body, "the request", most=len(body), levels=MOST_LEVELS, error=_unreadable, advice="")
        return self._api.read(values, context)

    def _warn(self, ignored: Sequence[str]) -> None:
        """Logs what was ignored, once: clients that send a key send it always."""
        if ignored and ignored not in self._warned:
            if len(self._warned) < MOST_WARNINGS:
                self._warned.add(tuple(ignored))
            log.warning("%s: ignored: %s (said once)", self._api.path, printable(", ".join(ignored)))

    async def _pieces(
        self, answering: Answering, context: Context
    ) -> AsyncGenerator[tuple[int, GenerationResult], None]:
        """The pieces of the answers; those that take too long end.

        Raises:
            ApiError: 503, if the first one takes too long.
        """
        loop = asyncio.get_running_loop()
        settings = self._settings
        late = self._service.late
        waiting = loop.call_later(settings.queue_seconds, lambda: answering.fail(late(settings.queue_seconds)))
        answer = loop.call_later(settings.answer_seconds, lambda: answering.cut(late(settings.answer_seconds)))
        metrics = self._service.metrics
        latest: dict[int, GenerationResult] = {}
        try:
            async with aclosing(answering.pieces()) as pieces:
                async for number, piece in pieces:
                    waiting.cancel()
                    metrics.piece(piece, latest.get(number))
                    latest[number] = piece
                    yield number, piece
        except (Disconnected, GeneratorExit):
            ended = sum(piece.finish_reason is not None for piece in latest.values())
            metrics.aborted(len(answering.handles) - ended)
            raise
        finally:
            waiting.cancel()
            answer.cancel()
            _log_answers(list(latest.values()), context)

    async def _stream(
        self,
        question: Question,
        pieces: AsyncIterator[tuple[int, GenerationResult]],
        context: Context,
        reply: Reply,
    ) -> None:
        async with aclosing(self._api.stream(question, pieces, context)) as chunks:
            async for chunk in chunks:
                await reply.part(chunk, self._api.media_type)
        await reply.end()


class Disconnected(Exception):
    """The client has gone; there is no one to tell."""


@asynccontextmanager
async def refusing(
    scope: Scope,
    reply: Reply,
    *,
    body: Callable[[ApiError], Mapping[str, Any]],
    broken: Callable[[ApiError], bytes],
    media_type: str,
) -> AsyncIterator[None]:
    """Sends the error that a `with` block ends with, as the end of the stream if one has begun.

    Args:
        scope: The request, for the log.
        reply: The response to it.
        body: Of a response that is an error.
        broken: The end of a stream.
        media_type: Of a stream.
    """
    context = reply.context
    try:
        yield
    except Disconnected:
        log.info("%s: the client went away after %.1f s", context.id, time.perf_counter() - context.start)
    except FastVLMError as err:
        error = as_api_error(err)
        log_error(scope, error, context.id)
        context.service.metrics.refused(error.code or str(error.status))
        with suppress(Disconnected):
            if reply.begun:
                await reply.part(broken(error), media_type)
                await reply.end()
            else:
                await reply.json(error.status, body(error), error_headers(error))


class Reply:
    """The response to a request.

    Args:
        send: Takes ASGI's messages.
        seconds: That the client may take for a part.
        context: The request.

    Attributes:
        context: The request.
        begun: Whether status and headers have been sent.
        warnings: What was ignored, for a header.
    """

    def __init__(self, send: Send, seconds: float, context: Context) -> None:
        self.context = context
        self.begun = False
        self.warnings: tuple[str, ...] = ()
        self._send = send
        self._seconds = seconds

    async def json(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole response."""
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        await self._begin(
            status, {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}
        )
        await self._message({"type": "http.response.body", "body": data})

    async def part(self, data: bytes, media_type: str) -> None:
        """Sends a part of a streamed response."""
        if not self.begun:
            await self._begin(200, {"content-type": media_type, "cache-control": "no-cache", "x-accel-buffering": "no"})
        await self._message({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Ends a streamed response."""
        await self._message({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True
        more = {"x-request-id": self.context.id}
        if self.warnings:
            warning = printable(f"ignored: {', '.join(self.warnings)}").strip()  # h11 takes no other value
            more["x-fastvlm-warning"] = warning.encode("ascii", "backslashreplace").decode()
        raw = [(name.encode(), value.encode("latin-1")) for name, value in {**headers, **more}.items()]
        await self._message({"type": "http.response.start", "status": status, "headers": raw})

    async def _message(self, message: dict[str, Any]) -> None:
        try:
            await asyncio.wait_for(self._send(message), self._seconds)
        except (OSError, asyncio.TimeoutError) as err:
            raise Disconnected from err


async def read_body(receive: Receive) -> bytearray:
    """The body of a request; `guard` bounds it."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def _watch(receive: Callable[[], Awaitable[Mapping[str, Any]]], answering: Answering) -> None:
    """Cancels the answers when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.fail(Disconnected())


def _log_answers(latest: Sequence[GenerationResult], context: Context) -> None:
    """Logs how long answers are and took, for those who want to know."""
    if latest:
        tokens = sum(piece.generated_tokens for piece in latest)
        seconds = time.perf_counter() - context.start
        ttft = min(piece.timings.ttft for piece in latest)
        prompt = latest[0].prompt_tokens
        log.info("%s: %d + %d tokens, the first after %.2f s, %.2f s", context.id, prompt, tokens, ttft, seconds)


def as_api_error(error: FastVLMError) -> ApiError:
    """What an error means over HTTP: whatever a request can cause is 400."""
    return error if isinstance(error, ApiError) else ApiError(400, str(error), code=_CODES.get(type(error)))


def error_headers(error: ApiError) -> dict[str, str]:
    """The headers that tell clients when to ask again."""
    return {} if error.retry_after is None else {"retry-after": str(math.ceil(error.retry_after))}


def _unreadable(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
