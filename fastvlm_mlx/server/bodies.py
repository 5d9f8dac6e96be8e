"""Bodies of requests: each within a size and a time, and all that are open within a size together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from fastvlm_mlx.formatting import readable_bytes
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class Room:
    """The bytes of all requests that are being read, wait or are answered.

    Args:
        settings: Of the server.
        retry_after: Seconds until there may be room again.

    Attributes:
        settings: Of the server.
    """

    def __init__(self, settings: Settings, retry_after: Callable[[], float]) -> None:
        self.settings = settings
        self._retry_after = retry_after
        self._held = 0

    def hold(self, size: int) -> None:
        """Counts more bytes.

        Raises:
            ApiError: If they are too many.
        """
        if self._held + size > self.settings.max_queue_bytes:
            most = readable_bytes(self.settings.max_queue_bytes)
            raise ApiError(
                429,
                f"the requests that are being answered have {most} already; ask again later",
                kind="rate_limit_error",
                code="too_many_bytes",
                retry_after=self._retry_after(),
            )
        self._held += size

    def release(self, size: int) -> None:
        """Counts bytes no longer."""
        self._held -= size


class Body:
    """The body of a request.

    Args:
        room: Counts the bytes of all requests.
        receive: Of the server.
        length: The announced one; None if there is none.

    Raises:
        ApiError: If it announces too much.
    """

    def __init__(self, room: Room, receive: Receive, length: int | None) -> None:
        self._room, self._receive, self._settings = room, receive, room.settings
        self._size, self._open = 0, True
        self._deadline = time.monotonic() + self._settings.body_seconds
        self._check(length or 0)

    async def receive(self) -> Message:
        """What the server gives; after the body that is the end of the connection, whenever that comes.

        Raises:
            ApiError: If the body is too large or too slow, or there is too much of all requests.
        """
        if not self._open:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            seconds = self._settings.body_seconds
            raise ApiError(408, f"the body was not complete after {seconds:g} s", code="body_too_slow") from None
        if message["type"] == "http.request":
            self._open = bool(message.get("more_body", False))
            size = len(message.get("body", b""))
            self._check(self._size + size)
            self._room.hold(size)
            self._size += size
        else:
            self._open = False
        return message

    def release(self) -> None:
        """Says that the request is over."""
        self._room.release(self._size)
        self._size = 0

    def _check(self, size: int) -> None:
        if size > (most := self._settings.max_body_bytes):
            raise ApiError(413, f"the body has more than {readable_bytes(most)}", code="body_too_large")
