"""HTTP connections that end at a deadline and, on request, reach only addresses on the public internet."""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

MAX_REDIRECTS = 3

# The prefix under which an IPv6 network reaches IPv4 addresses (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")
# All that is given out for the public internet; what is beyond it may lead to IPv4 addresses of the local network.
_IPV6_INTERNET = IPv6Network("2000::/3")


def open_url(url: str, *, deadline: float, private_hosts: bool) -> HTTPResponse:
    """Opens an http or https URL and returns the response, after at most 3 redirects.

    Connecting, the headers and the body share one deadline. A slow name server may outlast it.

    Args:
        url: Percent-encoded.
        deadline: By `time.monotonic`.
        private_hosts: Whether to connect to any host. Otherwise a host is resolved once, all of its addresses must be
            public, and the connection goes to one of these; the same holds for each redirect. Proxies that the
            environment names are then ignored, because a proxy resolves the host again.

    Raises:
        HTTPError: If the server answers with an error, or redirects too often or to another scheme.
        OSError: If the connection fails; `PermissionError` if a host is private, `TimeoutError` at the deadline.
        HTTPException: If the answer is malformed.
        ValueError: If the URL is malformed.
    """
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(None if private_hosts else {}),
        _Handler(deadline, private_hosts),
        _RedirectHandler(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    response = opener.open(Request(url, headers={"User-Agent": "fastvlm-mlx"}), timeout=_remaining(deadline))
    assert isinstance(response, HTTPResponse)
    return response


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, NAT64) counts as that.
    """
    ip: IPv4Address | IPv6Address | None = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        embedded = IPv4Address(int(ip) & 0xFFFF_FFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        if embedded is None and ip not in _IPV6_INTERNET:
            return False
        ip = embedded or ip
    assert ip is not None
    return ip.is_global and not ip.is_multicast


def _public_addresses(host: str, port: int) -> list[str]:
    """Resolves a host to its addresses.

    Raises:
        PermissionError: If one of them is not public.
        OSError: If the host has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    for address in addresses:
        if not is_public(address):
            where = "" if address == host else f" (its address is {address})"
            raise PermissionError(
                f"{host}{where} is not on the public internet; Allow(urls=True, private_hosts=True) permits it"
            )
    return addresses


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Connects to the first address that answers."""
    for number, address in enumerate(addresses, 1):
        try:
            return socket.create_connection((address, port), _remaining(deadline))
        except OSError:
            if number == len(addresses):
                raise
    raise OSError("the host has no address")


def _remaining(deadline: float) -> float:
    """Seconds until the deadline.

    Raises:
        TimeoutError: If it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


class _Reader(io.RawIOBase):
    """Reads from a socket until a deadline; a socket's own timeout starts again with every byte that arrives."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = sock, deadline
        self._stream = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_remaining(self._deadline))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Socket:
    """A socket that `http.client` reads through a `_Reader`."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._socket, self._deadline))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class _Connection(HTTPConnection):
    """A connection to a checked address, with a deadline in place of a timeout."""

    sock: Any
    deadline: float
    private_hosts: bool

    def connect(self) -> None:
        self.timeout = _remaining(self.deadline)
        if self.private_hosts:
            super().connect()  # directly or through a proxy
        else:
            self.sock = _connect(_public_addresses(self.host, self.port), self.port, self.deadline)


class _HTTPConnection(_Connection):
    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock, self.deadline)


class _HTTPSConnection(HTTPSConnection, _Connection):
    """`_Connection` connects; `HTTPSConnection` adds TLS and checks the certificate against the host's name."""

    def connect(self) -> None:
        super().connect()
        self.sock = _Socket(self.sock, self.deadline)


class _Handler(HTTPHandler):
    """Opens http and https URLs."""

    def __init__(self, deadline: float, private_hosts: bool) -> None:
        super().__init__()
        self._deadline, self._private_hosts = deadline, private_hosts

    def _open(self, kind: type[_Connection], request: Request) -> HTTPResponse:
        def connection(host: str, **options: Any) -> _Connection:
            made = kind(host, **options)
            made.deadline, made.private_hosts = self._deadline, self._private_hosts
            return made

        return self.do_open(connection, request)

    def http_open(self, request: Request) -> HTTPResponse:
        return self._open(_HTTPConnection, request)

    def https_open(self, request: Request) -> HTTPResponse:
        return self._open(_HTTPSConnection, request)

    https_request = HTTPHandler.http_request


class _RedirectHandler(HTTPRedirectHandler):
    """Follows a few redirects, from http or https to http or https."""

    def __init__(self) -> None:
        self._followed = 0

    def redirect_request(
        self, request: Request, response: IO[bytes], code: int, reason: str, headers: HTTPMessage, url: str
    ) -> Request | None:
        self._followed += 1
        if self._followed > MAX_REDIRECTS:
            refusal = f"more than {MAX_REDIRECTS} redirects"
        elif urlsplit(url).scheme not in ("http", "https"):
            refusal = f"a redirect to {url}, which is neither http nor https"
        else:
            response.close()  # otherwise, urllib would read its body first, however long that is
            return super().redirect_request(request, response, code, reason, headers, url)
        raise HTTPError(request.full_url, code, refusal, headers, response)
