"""Connections that end: uvicorn's HTTP/1.1 protocol with deadlines, a bound on their number, and errors in JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvlm_mlx.formatting import printable
from fastvlm_mlx.server.settings import Settings

HEAD_BYTES = 64 << 10
"""The most bytes of a request line and its headers."""
KEEP_ALIVE_SECONDS = 75
"""That a connection may wait for its next request; browsers and HTTP libraries give up earlier."""

_GRACE_SECONDS = 0.02
"""In which a new connection may send its request, however many others come meanwhile."""

logger = logging.getLogger("fastvlm_mlx.server")


def http_class(settings: Settings) -> type[asyncio.Protocol]:
    """The class to give to uvicorn as `http`."""
    return type("Connection", (_Connection,), {"settings": settings})


class _Connection(H11Protocol):
    """A connection of one client.

    uvicorn's own waits for ever for a first request, for the rest of a head and for a client that takes no answer.
    """

    settings: Settings
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the time for a head; makes room if there are too many connections."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._since = self.loop.time()
        self._watch()
        if len(self.connections) > self.settings.max_connections:
            self.loop.call_later(_GRACE_SECONDS, self._make_room)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Goes on reading, within the time for a head if none is complete."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Waits for the next request, or for a moment for what follows a refused one."""
        super().on_response_complete()
        self._since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY or self.transport.is_closing():
            self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Ends a connection that has been idle for too long."""
        super().timeout_keep_alive_handler()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all clocks."""
        self._stop()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the time in which the client has to take something."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.settings.send_seconds, self._abort_stalled)

    def resume_writing(self) -> None:
        """Ends that time."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP/1.1; `msg` is uvicorn's, the reason is the error that is being handled."""
        error = sys.exc_info()[1]
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        reason = f"the head is larger than {HEAD_BYTES} bytes" if too_large else printable(error or msg)
        self.refuse(reason, 431 if too_large else 400)

    def refuse(self, reason: str, status: int) -> None:
        """Ends the connection, with an answer if none has begun."""
        if self.transport.is_closing():
            return
        log_refusal(status, reason, self.client)
        if self.is_busy:
            self.cycle.disconnected = True  # the application hears that nobody listens any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            answer = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._watch()

    def _should_upgrade(self) -> bool:
        """False: there is nothing to upgrade to, and uvicorn would warn of each attempt."""
        return False

    def _watch(self) -> None:
        """Keeps a clock while a client owes a head, the rest of a refused request, or takes the rest of an answer."""
        if self.is_busy and not self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.settings.head_seconds, self._abort_late)

    def _make_room(self) -> None:
        """Ends the connection that has been idle for the longest time, or this one, if there are too many."""
        ours = [each for each in self.connections if isinstance(each, _Connection) and not each.transport.is_closing()]
        if len(ours) <= self.settings.max_connections:
            return
        if idle := [each for each in ours if not each.is_busy]:
            min(idle, key=lambda each: each._since).transport.abort()
        else:
            self.refuse(f"{self.settings.max_connections} requests are on their way already; ask again later", 503)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort_late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and not self.transport.is_closing():
            self.refuse(f"the head was not complete after {self.settings.head_seconds:g} s", 408)
        else:
            self.transport.abort()  # nothing came, or what came was not wanted any more

    def _abort_stalled(self) -> None:
        log_refusal(0, f"nothing of the answer was taken for {self.settings.send_seconds:g} s", self.client)
        self.transport.abort()


def log_refusal(status: int, reason: str, client: Any, request: str = "") -> None:
    """Writes one line about a request that was refused, or a connection that was ended (status 0).

    Args:
        status: Of the answer.
        reason: What the client is told.
        client: Its address and port.
        request: Method and path.
    """
    where = f"{client[0]}:{client[1]}" if client else "a local client"
    what = f"refused {status}" if status else "ended"
    logger.warning("%s %s from %s: %s", what, printable(request or "-", 120), where, printable(reason, 300))


class _Repeated(logging.Filter):
    """Leaves out what uvicorn says of a malformed request; the line of `log_refusal` gives the reason."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "Invalid HTTP request received."


logging.getLogger("uvicorn.error").addFilter(_Repeated())
