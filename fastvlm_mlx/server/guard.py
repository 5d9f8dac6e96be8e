"""The door of the server: who may ask, from where, and how much; everything else never reaches the APIs.

A web page that anyone visits can send requests to this machine. So the Host header has to name the server (or a page
could give its own name this machine's address), the Origin of a request has to be the server's own or an allowed one,
and no other page gets to read an answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from fastvlm_mlx.formatting import printable
from fastvlm_mlx.server.access import Hosts, Keys, host_name
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.bodies import Body, Message, Receive, Room, Scope, Send
from fastvlm_mlx.server.metrics import Metrics
from fastvlm_mlx.server.protocol import HEAD_BYTES, log_refusal
from fastvlm_mlx.server.settings import Settings

App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

OPEN_PATHS = ("/", "/health", "/ready")
"""What needs no key: the page, which asks for one, and what supervisors look at."""

_HEADER_NAME = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_MOST_ASKED_HEADERS = 50

# For every answer. The page has a policy of its own, which is kept.
_SECURITY: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
_SHOWN_TO_PAGES = b"x-request-id, x-fastvlm-warning, retry-after"


class Guard:
    """Passes on what may come in, and answers everything else with an error of the API that was called.

    Args:
        app: What answers.
        settings: Of the server.
        error: The body of an error, by the path that was called.
        metrics: Counts what is refused.
        retry_after: Seconds until there may be room again.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        error: Callable[[str, ApiError], Mapping[str, Any]],
        metrics: Metrics | None = None,
        retry_after: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._app = app
        self._settings = settings
        self._error = error
        self._metrics = metrics
        self._room = Room(settings, retry_after)
        self._keys = Keys(settings.api_keys)
        self._hosts = Hosts(settings)
        self._origins = {origin.rstrip("/").lower() for origin in settings.allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers: Headers = scope["headers"]
        answer = _Answer(send, self._cors(headers))
        try:
            self._check(scope)
            if scope["method"] == "OPTIONS" and _first(headers, b"access-control-request-method") is not None:
                await answer.send_all(204, _preflight(headers), b"")
                return
            self._check_key(scope)
            body = Body(self._room, receive, _length(headers))
        except ApiError as error:
            await self._refuse(scope, answer, error)
            return
        try:
            await self._app(scope, body.receive, answer.send)
        except ApiError as error:
            if answer.begun:
                raise
            await self._refuse(scope, answer, error)
        finally:
            body.release()

    async def _refuse(self, scope: Scope, answer: _Answer, error: ApiError) -> None:
        log_error(scope, error)
        if self._metrics is not None:
            self._metrics.refused(error.code or str(error.status))
        headers: Headers = [(b"content-type", b"application/json")]
        if error.retry_after is not None:
            headers.append((b"retry-after", str(math.ceil(error.retry_after)).encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        body = json.dumps(self._error(scope["path"], error), ensure_ascii=False).encode()
        await answer.send_all(error.status, headers, body)

    def _check(self, scope: Scope) -> None:
        """Checks the head of a request, but for the key."""
        headers: Headers = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
        if size + len(scope.get("query_string", b"")) > HEAD_BYTES:
            raise ApiError(431, f"the headers have more than {HEAD_BYTES} bytes", code="headers_too_large")
        host = _one(headers, b"host") or ""
        if not self._hosts.allow(host):
            raise ApiError(
                403 if host else 400,
                f"the Host header names {printable(host, 80) or 'nothing'}, which is not this server; if it is, "
                f"start the server with --allow-host {printable(host_name(host) or 'NAME', 80)}",
                kind="permission_error",
                code="host_not_allowed",
            )
        origin = _one(headers, b"origin")
        if origin is not None and not self._may_read(origin, host):
            raise ApiError(
                403,
                f"pages of {printable(origin, 80)} may not use this server; to let them, start it with "
                f"--allow-origin {printable(origin, 80)}",
                kind="permission_error",
                code="origin_not_allowed",
            )

    def _may_read(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may use the server: its own page, or one that the settings name."""
        origin = origin.lower()
        own = origin in (f"http://{host.lower()}", f"https://{host.lower()}")
        return own or origin in self._origins or "*" in self._origins

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or (scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")):
            return
        given = [value for name, value in scope["headers"] if name == b"x-api-key"]
        for name, value in scope["headers"]:
            scheme, _, key = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":
                given.append(key)
        if not self._keys.match([key.strip() for key in given]):
            what = "the key is not one of this server's" if given else "a key is needed"
            raise ApiError(
                401,
                f"{what}; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _cors(self, headers: Headers) -> Headers:
        """The headers that let a page of an allowed origin read the answer."""
        origin, host = _first(headers, b"origin"), _first(headers, b"host") or b""
        if origin is None or not self._may_read(origin.decode("latin-1"), host.decode("latin-1")):
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _SHOWN_TO_PAGES),
            (b"vary", b"Origin"),
        ]


class _Answer:
    """Adds headers to an answer.

    Args:
        send: Of the server.
        headers: What is added to the security headers.

    Attributes:
        begun: Whether its head has been sent.
    """

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send, self._headers = send, headers
        self.begun = False

    async def send(self, message: Message) -> None:
        """Sends a part."""
        if message["type"] == "http.response.start":
            self.begun = True
            headers: Headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            headers += [(name, value) for name, value in _SECURITY if name not in present]
            message = {**message, "headers": headers + self._headers}
        await self._send(message)

    async def send_all(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends the whole answer."""
        if status != 204:
            headers = [*headers, (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def log_error(scope: Scope, error: ApiError, request_id: str = "") -> None:
    """Writes one line about a request that was refused.

    Args:
        scope: Of the request.
        error: What the client is told.
        request_id: What the answer calls the request.
    """
    request = f"{scope['method']} {printable(scope['path'], 100)} {request_id}".rstrip()
    log_refusal(error.status, str(error), scope.get("client"), request)


def _preflight(headers: Headers) -> Headers:
    """What a browser wants to know before a page's request; every header that it asks for may be sent."""
    asked = b",".join(value for name, value in headers if name == b"access-control-request-headers").split(b",")
    names = [name.strip() for name in asked if _HEADER_NAME.fullmatch(name.strip())][:_MOST_ASKED_HEADERS]
    answer: Headers = [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", b", ".join(names) or b"content-type, authorization, x-api-key"),
        (b"access-control-max-age", b"600"),
    ]
    if _first(headers, b"access-control-request-private-network") == b"true":
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


def _first(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


def _one(headers: Headers, name: bytes) -> str | None:
    """The value of a header that may be there once.

    Raises:
        ApiError: If it is there more often.
    """
    values = [value for key, value in headers if key == name]
    if len(values) > 1:
        raise ApiError(400, f"there are {len(values)} {name.decode()} headers", code="repeated_header")
    return values[0].decode("latin-1") if values else None


def _length(headers: Headers) -> int | None:
    """The length of the body that is announced."""
    value = _first(headers, b"content-length") or b""
    return int(value) if re.fullmatch(rb"\d{1,20}", value) else None
