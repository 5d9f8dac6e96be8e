"""The background server's own door: questions of this machine's command line, on its Unix socket only."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from fastvlm_mlx.backend import blas, compute_dtype, device, mx
from fastvlm_mlx.cache import use
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.choose import choose
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.inputs.images import load_turned
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.recent import Recent
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.inputs.turned import TurnedImage
from fastvlm_mlx.jobs.captions import opening_length
from fastvlm_mlx.jobs.fingerprints import checkpoint_files, checkpoint_fingerprint, versions
from fastvlm_mlx.machine import cache_folder
from fastvlm_mlx.resolve import resolve, settled
from fastvlm_mlx.schema import parse_object
from fastvlm_mlx.server.answering import Answering
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.warm.client import program
from fastvlm_mlx.warm.wire import (
    ASK,
    HELLO,
    STATUS,
    STOP,
    Question,
    choices_record,
    error_record,
    line,
    piece_record,
)

MEDIA_TYPE = b"application/x-ndjson"
_MOST_BYTES = 2 << 30
_opened: Recent[object, tuple[TurnedImage, list[str]]] = Recent(2)
"""Images of the latest questions: the next one is often about the same."""
"""Of a question; a file of an image may have half of that."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """The model that a background server holds, and the files that it is loaded from.

    Attributes:
        folder: The converted checkpoint.
        computes: The type that the model computes in.
        files: Of the checkpoint, with numbers that change when they do.
        program: What has to be the same in whoever asks.
    """

    folder: Path
    computes: str
    files: list[list[int]]
    program: dict[str, Any]

    @classmethod
    def of(cls, wanted: Mapping[str, Any]) -> Held:
        """What `Holding.record` describes; converts it into the cache if necessary.

        Raises:
            FastVLMError: If there is no such checkpoint.
        """
        folder = resolve(_name(wanted), revision=wanted["revision"])
        return cls(folder=folder, computes=_computes(wanted, folder), files=_files(folder), program=program())

    def is_what(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it is what `Holding.record` describes, and its files are as they were."""
        if any(wanted.get(key) != value for key, value in self.program.items()):
            return False
        with suppress(FastVLMError, OSError):
            folder = settled(_name(wanted), revision=wanted["revision"])
            if folder is None or not folder.samefile(self.folder) or _files(folder) != self.files:
                return False
            use(folder)
            return _computes(wanted, folder) == self.computes
        return False


def _name(wanted: Mapping[str, Any]) -> Path | str:
    name = str(wanted["model"])
    return Path(name) if wanted["on_disk"] else name


def _computes(wanted: Mapping[str, Any], folder: Path) -> str:
    """The type that a model computes in if it is loaded as `wanted` says."""
    chosen: str | None = wanted["dtype"]
    return chosen or str(compute_dtype(ModelConfig.from_path(folder).dtype)).rpartition(".")[2]


def _files(folder: Path) -> list[list[int]]:
    return versions([*checkpoint_files(folder), folder / "config.json"])


class WarmDoor:
    """Answers the command line on the paths below `/warm/`, and hands everything else to another application.

    Args:
        app: The other application.
        service: What answers.
        stop: Ends the server.
        idle_seconds: After which the server is ended if nobody has asked anything; 0 for never.

    Attributes:
        held: The model, as soon as it is loaded.
    """

    def __init__(self, app: ASGIApp, service: Service, stop: Callable[[], None], idle_seconds: float) -> None:
        self._app = app
        self._service = service
        self._stop = stop
        self._idle_seconds = idle_seconds
        self._open = 0
        self._latest = self._since = time.monotonic()
        self._answered = 0
        self.held: Held | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith("/warm/"):
            with self._busy():
                await self._app(scope, receive, send)
            return
        try:
            body = await _read(receive)
            if body is not None:
                await self._reply(path, body, receive, send)
        except ApiError as error:
            await _send(send, error.status, {"reason": str(error)})
        except (ValueError, TypeError, KeyError, FastVLMError) as error:
            await _send(send, 400, {"reason": type(error).__name__})

    async def _reply(self, path: str, body: bytearray, receive: Receive, send: Send) -> None:
        if path == ASK:
            with self._busy():
                await self._ask(body, receive, send)
        elif path == HELLO:
            await _send(send, 200, await asyncio.to_thread(self._hello, parse_object(body, "the request")))
        elif path == STATUS:
            await _send(send, 200, self._status())
        elif path == STOP:
            await _send(send, 200, {"pid": os.getpid()})
            self._stop()
        else:
            await _send(send, 404, {})

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._latest = time.monotonic()

    def watch(self) -> None:
        """Ends the server when nobody has asked anything for long enough; for a thread of its own."""
        self._latest = time.monotonic()  # loading took its time
        while self._idle_seconds:
            left = self._latest + self._idle_seconds - time.monotonic()
            if left <= 0 and not self._open:
                self._stop()
                return
            time.sleep(max(left, min(1.0, self._idle_seconds)))

    def _status(self) -> dict[str, Any]:
        idle = 0.0 if self._open else time.monotonic() - self._latest
        return {
            "pid": os.getpid(),
            "state": self._service.state,
            "model": self._service.name,
            "dtype": self.held.computes if self.held else None,
            "answered": self._answered,
            "answering": self._open,
            "up_seconds": time.monotonic() - self._since,
            "idle_seconds": idle,
            "ends_in_seconds": max(self._idle_seconds - idle, 0.0) if self._idle_seconds else None,
            "memory_bytes": mx.get_active_memory(),
            **program(),
        }

    def _hello(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        held, engine = self.held, self._service.engine
        if held is None or engine is None or self._service.state != "ready" or not held.is_what(wanted):
            return {"holds": False}
        return {
            "holds": True,
            "pid": os.getpid(),
            "weights": checkpoint_fingerprint(held.folder, cache_folder() / "digests.json"),
            "dtype": held.computes,
            "max_batch": engine.max_batch,
            "slow": blas().hint if device() == "cpu" else "",
        }

    async def _ask(self, body: bytearray, receive: Receive, send: Send) -> None:
        """Answers a question, in lines of JSON."""
        question, extra = Question.decode(body)
        self._service.check_ready()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", MEDIA_TYPE)]})

        async def write(record: Mapping[str, Any]) -> None:
            await send({"type": "http.response.body", "body": line(record), "more_body": True})

        transparent: list[str] = []
        try:
            try:
                images = await asyncio.to_thread(_open, question, transparent)
            finally:
                for name in transparent:
                    await write({"transparent": name})
            await write({"seen": True})
            if extra.get("measure"):
                await write(await asyncio.to_thread(self._measure, question, images))
            elif question.choices:
                await write(await asyncio.to_thread(self._choose, question, images))
            else:
                await self._stream(question, images, receive, write)
        except FastVLMError as error:
            await write(error_record(error))
        await send({"type": "http.response.body", "body": b""})

    def _measure(self, question: Question, images: list[TurnedImage]) -> dict[str, Any]:
        processor = self._processor
        tokens, visual = processor.measure(
            images, question.prompt, resolution=question.resolution, system=question.system
        )
        return {"size": {"prompt_tokens": tokens, "visual_tokens": visual, "context_length": processor.context_length}}

    def _choose(self, question: Question, images: list[TurnedImage]) -> dict[str, Any]:
        engine = self._service.engine
        assert engine is not None
        choices = choose(
            engine.model,
            self._processor,
            question.choices,
            image=images or None,
            prompt=question.prompt,
            system=question.system,
            resolution=question.resolution,
        )
        return choices_record(choices)

    @property
    def _processor(self) -> FastVLMProcessor:
        assert self._service.engine is not None
        return self._service.engine.processor

    async def _stream(
        self,
        question: Question,
        images: list[TurnedImage],
        receive: Receive,
        write: Callable[[Mapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Streams an answer; a client that goes away ends it."""
        request = Request(
            image=images or None,
            prompt=question.prompt,
            system=question.system,
            resolution=question.resolution,
            config=question.config,
            sentence=question.sentence,
            schema=question.schema,
            prefix=question.prefix,
            max_words=question.max_words,
            opening=opening_length if question.removes_openings else None,
        )
        answering = self._service.submit([request])
        watching = asyncio.create_task(_cancel_when_gone(receive, answering))
        try:
            async with aclosing(answering.pieces()) as pieces:
                async for _, piece in pieces:
                    await write({**piece_record(piece), "peak_memory": mx.get_peak_memory()})
            self._answered += 1
        except (CancelledError, OSError):  # the client has gone
            pass
        finally:
            watching.cancel()
            self._service.leave(answering)


def _open(question: Question, transparent: list[str]) -> list[TurnedImage]:
    """The images of a question; adds the names of those that show what is stored in transparent pixels."""

    def opened(image: Encoded) -> tuple[TurnedImage, list[str]]:
        names: list[str] = []
        return load_turned(image, background=question.background, notify=names.append), names

    images = []
    for encoded in question.images:
        image, names = _opened.get((encoded.data, question.background), partial(opened, encoded))
        images.append(image)
        transparent += names  # also if the next one is none
    return images


async def _cancel_when_gone(receive: Receive, answering: Answering) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()


async def _read(receive: Receive) -> bytearray | None:
    """The body of a request; None if the client has gone.

    Raises:
        ValueError: If it is too large.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > _MOST_BYTES:
            raise ValueError("too large")
        if not message.get("more_body", False):
            return body


async def _send(send: Send, status: int, record: Mapping[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", MEDIA_TYPE)]})
    await send({"type": "http.response.body", "body": line(record)})
