"""Servers that do what a test wants: they speak HTTP like `fastvlm serve`, and answer with made-up text."""

import base64
import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.jobs.exchange import Address

MODEL = {
    "id": "demo",
    "aliases": ["fastvlm-demo"],
    "weights": "w" * 32,
    "dtype": "float32",
    "version": __version__,
    "system_fingerprint": "fp_1",
    "image_resolution": 192,
    "limits": {"max_batch": 2, "max_queue": 9, "max_body_bytes": 10**7, "max_tokens": 2048, "max_resolution": 1536},
}


def answer_of(data: bytes, question: str) -> str:
    """The text that every server gives to a question about a picture."""
    return f"{hashlib.sha256(data).hexdigest()[:8]}: {question}"


class Server:
    """A server; a test changes its attributes while it runs.

    Attributes:
        model: What it says that it holds.
        goes_on: Cleared, it is as if stopped: it takes what comes in, and says nothing.
        seconds: That an answer takes.
        misbehave: Called for each question before it is answered, with the handler and the number of questions so far;
            True if it has dealt with the question.
        asked: The pictures and questions, in their order.
        headers: Of the latest request.
        most: The most questions at the same time so far.
    """

    def __init__(self, certificate: Path | None = None, host: str = "127.0.0.1") -> None:
        self.host = host
        self.model: dict[str, Any] = dict(MODEL)
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.seconds = 0.0
        self.misbehave: Callable[[Any, int], bool] = lambda handler, number: False
        self.asked: list[tuple[str, str]] = []
        self.headers: dict[str, str] = {}
        self.most = self._now = 0
        self.lock = threading.Lock()
        self._certificate = certificate
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def address(self) -> Address:
        scheme = "https" if self._certificate else "http"
        return Address.parse(f"{scheme}://{self.host}:{self.port}")

    def start(self) -> None:
        """Listens; again on the same port."""
        server = ThreadingHTTPServer((self.host, self.port), _handler(self))
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if self._certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self._server, self.port = server, server.server_address[1]
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

    def kill(self) -> None:
        """Breaks all connections, and listens no more."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def reply(self, handler: Any, values: Any, status: int = 200, **headers: str) -> None:
        data = values if isinstance(values, bytes) else json.dumps(values).encode()
        handler.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    def get(self, handler: Any) -> None:
        self.headers = dict(handler.headers)
        self.goes_on.wait(60)
        if handler.path == "/health":
            self.reply(handler, {"status": "ok"})
        elif handler.path == "/v1/models":
            self.reply(handler, {"object": "list", "data": [self.model]})
        else:
            self.reply(handler, {"error": {"message": "nothing there"}}, 404)

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        self.headers = dict(handler.headers)
        image, text = body["messages"][-1]["content"]
        data = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        with self.lock:
            self.asked.append((hashlib.sha256(data).hexdigest(), text["text"]))
            number = len(self.asked)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            self.goes_on.wait(60)
            time.sleep(self.seconds)
            if not self.misbehave(handler, number):
                self.reply(handler, self.answer(answer_of(data, text["text"])))
        finally:
            with self.lock:
                self._now -= 1

    def answer(self, text: str, **changes: Any) -> dict[str, Any]:
        timings = ("preprocess_ms", "time_to_first_token_ms", "generation_time_ms", "total_ms", "queue_time_ms")
        return {
            "system_fingerprint": self.model["system_fingerprint"],
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"image_tokens": 4}},
            "timings": {name: 1.0 for name in timings},
            **changes,
        }


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server._connections.add(self.connection)

        def finish(self) -> None:
            server._connections.discard(self.connection)
            with suppress(OSError, ValueError):
                super().finish()

        def do_GET(self) -> None:
            server.get(self)

        def do_POST(self) -> None:
            server.post(self)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def servers(count: int, certificate: Path | None = None) -> Iterator[list[Server]]:
    """Some servers that hold the same model."""
    running = [Server(certificate) for _ in range(count)]
    try:
        yield running
    finally:
        for server in running:
            server.kill()
