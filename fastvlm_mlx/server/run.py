"""Runs a server: it listens before the model loads, answers until a signal, and then ends in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.server.protocol import HEAD_BYTES, KEEP_ALIVE_SECONDS, http_class
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import address, allow_connections, listen, remove

LAST_SECONDS = 2.0
"""That clients have to read the errors with which the last answers end."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


def serve(
    app: ASGIApp,
    service: Service,
    settings: Settings,
    load: Callable[[], Engine],
    *,
    notify: Callable[[str], None],
    sockets: Sequence[socket.socket] | None = None,
) -> None:
    """Serves a model until SIGTERM or an interrupt; for the main thread.

    It listens at once, and answers with 503 until the model is there. After the first signal no new question is
    answered, and those on their way may end within `drain_seconds`; a second signal ends the program.

    Args:
        app: From `make_app`.
        service: The model.
        settings: Where to listen, and how to end.
        load: Makes the engine; an error of it ends the server.
        notify: Called with lines for the user.
        sockets: Already bound, instead of those that the settings say.

    Raises:
        ConfigError: If the address is in use or cannot be used.
        SystemExit: For a signal while the model loads, and for a second one.
        FastVLMError: If the model cannot be loaded.
    """
    allow_connections(settings.max_connections)
    own = listen(settings) if sockets is None else list(sockets)
    with ExitStack() as stack:
        if service.album is not None:
            stack.callback(service.album.close)
        if settings.unix_socket is not None and sockets is None:
            stack.callback(remove, settings.unix_socket)
        notify(f"listening on {address(settings, own)}")
        server = stack.enter_context(Running(app, service, settings, own))
        try:
            engine = stack.enter_context(load())
        except BaseException:
            service.state = "failed"
            raise
        stack.callback(server.end)  # before the engine is closed
        if service.album is not None:
            stack.callback(service.album.stop)  # before that, too
        service.start(engine)
        notify(f"ready: {service.name}, {engine.max_batch} at a time")
        with server.signals():
            server.wait()
        notify("stopped")


class Running:
    """A server in a thread of its own.

    Args:
        app: The ASGI application.
        service: The model.
        settings: How to end.
        sockets: To listen on; closed at the end.
    """

    def __init__(self, app: ASGIApp, service: Service, settings: Settings, sockets: list[socket.socket]) -> None:
        config = uvicorn.Config(
            app,
            http=http_class(settings),
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=int(LAST_SECONDS),
        )
        self._service = service
        self._settings = settings
        self._server = _Server(config)
        self._sockets = sockets
        self._ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fastvlm-server", daemon=True)
        self._error: BaseException | None = None
        self._draining: asyncio.Task[None] | None = None

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait(self) -> None:
        """Waits until the server has ended; signals are handled meanwhile.

        Raises:
            BaseException: Whatever has ended the server, if `stop` and `end` did not.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Begins to end: nothing new is answered, and what is on its way may end within `drain_seconds`."""
        self._call(self._begin_to_drain)

    def end(self) -> None:
        """Ends at once, and waits for that; what is on its way ends with an error."""
        self._call(self._service.stop)
        self._call(self._service.cancel_all)
        self._call(self._server.stop)
        self._ended.wait(2 * LAST_SECONDS)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Lets the first signal stop the server, and the second one end the program."""
        seen: list[int] = []

        def handle(number: int, _: FrameType | None) -> None:
            if seen:
                raise SystemExit(128 + number)
            seen.append(number)
            self.stop()

        earlier = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _call(self, function: Callable[[], Any]) -> None:
        """Calls a function in the server's thread, unless it has ended."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._server.serve(sockets=self._sockets))
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._loop.close()
            self._ended.set()

    def _begin_to_drain(self) -> None:
        self._draining = self._draining or self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        self._service.stop()
        log.warning("stopping; %d on their way", self._service.running)
        if not await self._service.idle(self._settings.drain_seconds):
            self._service.cancel_all()
            await self._service.idle(LAST_SECONDS)
        self._server.stop()


class _Server(uvicorn.Server):
    """uvicorn's server without its clock: idle, it does nothing at all."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Ends the server; from its own thread."""
        self.should_exit = True
        self._stopped.set()

    async def main_loop(self) -> None:
        """Waits until `stop` is called."""
        await self._stopped.wait()
