"""A client that speaks ASGI to an app in this process: no socket, and a hand on when it goes away."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import h11


@dataclass
class Response:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each server-sent event; `[DONE]` as a string."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def named_events(self) -> list[tuple[str, Any]]:
        """The name and the JSON of each server-sent event."""
        pairs = [event.split("\ndata: ") for event in self.body.decode().split("\n\n") if event]
        return [(name.removeprefix("event: "), json.loads(data)) for name, data in pairs]

    @property
    def lines(self) -> list[Any]:
        """The JSON of each line."""
        return [json.loads(line) for line in self.body.decode().splitlines()]


class Call:
    """A request on its way; await `response`, or `go_away`."""

    def __init__(
        self, app: Any, method: str, path: str, body: bytes, headers: dict[str, str], chunk: int, cut: bool
    ) -> None:
        self.response = Response()
        self._gone = asyncio.Event()
        self._cut = cut
        self._part = asyncio.Event()
        self._reading = asyncio.Event()
        self._reading.set()
        self._chunks = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._chunks:
            chunk = self._chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks) or self._cut}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self._reading.wait()
        if self._gone.is_set():
            raise OSError("the client has gone")
        if message["type"] == "http.response.start":
            h11.Response(status_code=message["status"], headers=message["headers"])  # refuses what no header can be
            self.response.status = message["status"]
            self.response.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        elif message.get("body"):
            self.response.parts.append(message["body"])
            self._part.set()

    async def first_part(self) -> None:
        """Waits until something of the body is here."""
        await asyncio.wait_for(self._part.wait(), 60)

    def stop_reading(self) -> None:
        """Takes no more of the response."""
        self._reading.clear()

    async def go_away(self) -> None:
        """Closes the connection, and waits until the server is done with it."""
        self._gone.set()
        await asyncio.wait_for(self.task, 60)


class Client:
    """Asks an app.

    Args:
        app: The ASGI application.
        headers: Sent with each request.
    """

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        self._app = app
        self._headers = {"host": "127.0.0.1:8000", **(headers or {})}

    def begin(
        self, method: str, path: str, body: Any = None, *, chunk: int = 1 << 16, cut: bool = False, **headers: str
    ) -> Call:
        """Sends a request; the answer may be waited for. A `bytes` body goes out as it is, all else as JSON.

        Of a body that is `cut`, the end never comes.
        """
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        length = {"content-length": str(len(data))} if method == "POST" else {}
        all_headers = {**self._headers, "content-type": "application/json", **length, **more}
        return Call(self._app, method, path, data, all_headers, chunk, cut)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Response:
        """Sends a request, and waits for the whole response."""
        call = self.begin(method, path, body, **options)
        await asyncio.wait_for(call.task, 60)
        return call.response

    async def get(self, path: str, **options: Any) -> Response:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Response:
        return await self.ask("POST", path, body, **options)
