"""HTTP and HTTPS to a server: an address, and a connection for one request after another."""

import json
import re
import socket
import ssl
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import ConfigError, ServerError
from fastvlm_mlx.formatting import printable

CONNECT_SECONDS = 5.0
"""For a connection, and for everything that a server says without its model."""
ANSWER_SECONDS = 900.0
"""For an answer; a server gives up before that."""
_LARGEST = 16 << 20
"""Bytes of an answer."""


class LostError(ServerError):
    """A server that did not answer, or not in its language; another one may."""


class Address(NamedTuple):
    """Where a server listens.

    Attributes:
        scheme: `http` or `https`.
        host: A name or a number.
        port: Of the host.
        path: What is before `/v1`; empty, or with a slash at its beginning.
    """

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address in a URL such as `http://10.0.0.2:8000`, with or without `/v1`; http is the default.

        Raises:
            ConfigError: If it is none, or holds a password.
        """
        url = text.strip() if "://" in text else f"http://{text.strip()}"
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as err:
            raise ConfigError(f"{printable(text, 80)} is no address of a server ({printable(err)})") from err
        if "@" in parts.netloc:
            raise ConfigError("an address of a server holds no key; FASTVLM_API_KEY or --api-key-file gives it")
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
        if not good or not re.fullmatch(r"[!-~]+", url):
            raise ConfigError(
                f"{printable(text, 80)} is no address of a server; expected one like http://10.0.0.2:8000"
            )
        return cls(parts.scheme, str(parts.hostname), port, parts.path.rstrip("/").removesuffix("/v1"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


class Exchange:
    """A connection to a server, for one request after another; made again when it has gone.

    Args:
        address: Of the server.
        key: For it; empty for none. No message holds it.
        context: For https; None for http, or the certificates that the system trusts.
    """

    def __init__(self, address: Address, key: str = "", context: ssl.SSLContext | None = None) -> None:
        self._address, self._key = address, key
        self._context = context
        self._connection: HTTPConnection | None = None
        self._is_cut = False

    def renew(self) -> None:
        """Forgets that it was cut; before it is used for the next request."""
        self._is_cut = False

    def close(self) -> None:
        """Ends the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def cut(self) -> None:
        """Ends what another thread waits for, with an error there."""
        self._is_cut = True
        connection = self._connection
        sock = getattr(connection, "sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def get(self, path: str) -> tuple[int, Any]:
        """The status and the JSON of what is asked by GET, within `CONNECT_SECONDS` for each part of it.

        Raises:
            LostError: If there is none.
        """
        status, _, values = self._ask("GET", path, (), CONNECT_SECONDS)
        return status, values

    def post(self, path: str, parts: tuple[bytes, ...]) -> tuple[int, float, Any]:
        """The status, the seconds after which to ask again, and the JSON of an answer to a body in parts.

        Raises:
            LostError: If there is none.
        """
        return self._ask("POST", path, parts, ANSWER_SECONDS)

    def _ask(self, method: str, path: str, parts: tuple[bytes, ...], seconds: float) -> tuple[int, float, Any]:
        headers = {"Accept": "application/json", "User-Agent": f"fastvlm-mlx/{__version__}"}
        if parts:
            headers |= {"Content-Type": "application/json", "Content-Length": str(sum(map(len, parts)))}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            response = self._send(method, self._address.path + path, parts, headers, seconds)
            data = response.read(_LARGEST + 1)
            if len(data) > _LARGEST or response.length:
                raise LostError("half an answer" if response.length else "an answer without an end")
            retry_after = _seconds(response.headers.get("Retry-After", ""))
            if response.will_close:
                self.close()
        except LostError:
            self.close()
            raise
        except (OSError, HTTPException) as err:
            self.close()
            raise LostError(_reason(err)) from err
        try:
            return response.status, retry_after, json.loads(data)
        except (ValueError, RecursionError) as err:
            raise LostError(f"status {response.status} with something else than JSON") from err

    def _send(
        self, method: str, path: str, parts: tuple[bytes, ...], headers: dict[str, str], seconds: float
    ) -> HTTPResponse:
        """The response to a request. A connection that has been idle may be closed; another one is made then."""
        for is_old in (self._connection is not None, False):
            connection = self._connect(seconds)
            try:
                connection.request(method, path, body=iter(parts) if parts else None, headers=headers)
                return connection.getresponse()
            except (ConnectionError, HTTPException):
                self.close()
                if not is_old or self._is_cut:
                    raise
        raise AssertionError

    def _connect(self, seconds: float) -> HTTPConnection:
        if self._connection is None:
            address = self._address
            if address.scheme == "https":
                context = self._context or ssl.create_default_context()
                self._connection = HTTPSConnection(address.host, address.port, timeout=CONNECT_SECONDS, context=context)
            else:
                self._connection = HTTPConnection(address.host, address.port, timeout=CONNECT_SECONDS)
            self._connection.connect()
        self._connection.sock.settimeout(seconds)
        return self._connection


def _reason(error: Exception) -> str:
    """Why a connection has failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, socket.gaierror):
        return "there is no such host"
    if isinstance(error, HTTPException):
        return f"half an answer ({type(error).__name__})"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _seconds(text: str) -> float:
    return min(float(text), 120.0) if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text) else 1.0
