"""What an API of the server is: it reads a question from JSON, and writes answers and errors in its own shape."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult

if TYPE_CHECKING:
    from fastvlm_mlx.server.service import Service
    from fastvlm_mlx.server.settings import Settings


class ApiError(FastVLMError):
    """A request that is not answered, and why.

    Attributes:
        status: The HTTP status.
        kind: What OpenAI's API calls the type of an error.
        param: The key of the request that is wrong, such as `messages[0].content`.
        code: A word for programs.
        retry_after: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an API knows about the request at hand.

    Attributes:
        service: The model, and what it is called.
        settings: What the server allows.
        id: Hexadecimal digits that no other request has.
        created: When it arrived, in seconds since 1970.
        start: When it arrived, a time of `time.perf_counter`.
    """

    service: Service
    settings: Settings
    id: str
    created: int
    start: float

    @classmethod
    def of(cls, service: Service, settings: Settings) -> Context:
        """That of a request which has just arrived."""
        now = int(time.time())
        return cls(service=service, settings=settings, id=secrets.token_hex(12), created=now, start=time.perf_counter())


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the body of a request becomes.

    Attributes:
        requests: One for each answer; they differ in their seeds only. None, if the body of the answer is known.
        stream: Whether the answer is sent piece by piece.
        model: The model's name as the request gives it.
        warnings: What was ignored; goes into a header and the log.
        options: What the API needs for its answer.
    """

    requests: tuple[Request, ...]
    stream: bool = False
    model: str = ""
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Api(Protocol):
    """One way to ask and to be answered.

    Attributes:
        path: Where it is asked, by POST.
        media_type: The content type of its streams.
    """

    path: str
    media_type: str

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body; runs outside the event loop.

        Raises:
            FastVLMError: If it cannot be answered.
        """

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of a whole answer."""

    def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """The body of a streamed answer, in the parts to send; `pieces` has each with its request's place."""

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that an error has."""

    def broken(self, error: ApiError) -> bytes:
        """The last part of a stream that an error ends."""


class Known:
    """Part of an API whose answers need no model: none is streamed."""

    async def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """Nothing."""
        nothing: tuple[bytes, ...] = ()
        for part in nothing:
            yield part


def openai_error(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}
