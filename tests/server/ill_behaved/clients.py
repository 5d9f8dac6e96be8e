"""Clients that no server should have: each does one kind of harm to a server, and says what came of it.

A client is a function of a port and a source of chance. It returns the statuses that it got, in words, and raises
`Wrong` for an answer that no client may get: any 5xx but 503, or what is no HTTP.
"""

import contextlib
import http.client
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from random import Random

from fastvlm_mlx.server.app import APIS
from tests.server.ill_behaved import fields

Client = Callable[[int, Random], str]

PATHS = [api.path for api in APIS]
CHAT = "/v1/chat/completions"
SECONDS = 45.0
"""A server that says nothing for so long has forgotten its client."""


class Wrong(Exception):
    """An answer that no client may get."""


@contextlib.contextmanager
def connected(port: int, **options: int) -> Iterator[socket.socket]:
    """A connection, with socket options such as SO_RCVBUF set before it is made."""
    with socket.socket() as connection:
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(SECONDS)
        connection.connect(("127.0.0.1", port))
        yield connection


def head(method: str, path: str, **headers: object) -> bytes:
    """The head of a request."""
    lines = {"Host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1")


def post(path: str, body: object, **headers: object) -> bytes:
    """A whole request."""
    data = body if isinstance(body, bytes) else fields.encode(body)
    return head("POST", path, Content_Length=len(data), Content_Type="application/json", **headers) + data


def send(connection: socket.socket, data: bytes) -> None:
    """Sends what the other side takes; it may close in the middle, with an answer on its way."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)


def status(connection: socket.socket, *, body: bool = True) -> str:
    """The status of the next answer, or `closed`.

    Raises:
        Wrong: If it is one that no client may get.
    """
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
        content = answer.read() if body else b""
    except (ConnectionError, http.client.RemoteDisconnected):
        return "closed"
    except http.client.IncompleteRead:
        return "cut"
    except (http.client.HTTPException, ValueError) as error:
        raise Wrong(f"no HTTP: {error!r}") from error
    except TimeoutError as error:
        raise Wrong(f"silent for {SECONDS:g} s") from error
    if answer.status >= 500 and answer.status != 503:
        raise Wrong(f"{answer.status} {content[:300]!r}")
    if answer.status >= 400 and body:
        _check_error(answer, content)
    return str(answer.status)


def _check_error(answer: http.client.HTTPResponse, content: bytes) -> None:
    try:
        error = json.loads(content)["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, LookupError, TypeError) as cause:
        raise Wrong(f"{answer.status} in no API's shape: {content[:300]!r}") from cause
    if not message or not message.isprintable() or "Traceback" in message:
        raise Wrong(f"{answer.status} without a fit message: {message!r}")


def exchange(port: int, data: bytes) -> str:
    """Sends bytes, and gives the status of the answer."""
    with connected(port) as connection:
        send(connection, data)
        return status(connection)


def long_request(random: Random, tokens: int = 400) -> bytes:
    """A stream that goes on for a while."""
    body = fields.example(CHAT)
    body |= {"stream": True, "max_tokens": tokens, "ignore_eos": True, "seed": random.randrange(1000), "temperature": 1}
    return post(CHAT, body)


def cut(port: int, random: Random) -> str:
    """A request that ends in the middle."""
    data = post(random.choice(PATHS), fields.example(CHAT))
    with connected(port) as connection:
        send(connection, data[: random.randrange(len(data))])
        if random.random() < 0.5:
            _reset_at_close(connection)
    return "left"


def half_closed(port: int, random: Random) -> str:
    """A client that says that nothing follows, and waits for its answer."""
    with connected(port) as connection:
        send(connection, post(CHAT, fields.example(CHAT)))
        connection.shutdown(socket.SHUT_WR)
        return status(connection)


def slow_head(port: int, random: Random) -> str:
    """A head that comes byte by byte."""
    return _slowly(port, head("GET", "/health", X="x" * 100_000), 0.1)


def slow_body(port: int, random: Random) -> str:
    """A body that comes byte by byte."""
    data = head("POST", CHAT, Content_Length=100_000) + b" " * 100_000
    return _slowly(port, data, 0.1, at_once=data.index(b"\r\n\r\n") + 4)


def _slowly(port: int, data: bytes, pause: float, at_once: int = 0) -> str:
    with connected(port) as connection:
        send(connection, data[:at_once])
        for byte in data[at_once:]:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(pause)
        return status(connection)


def idle(port: int, random: Random, number: int = 100, seconds: float = 1.0) -> str:
    """Many connections that say nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            with contextlib.suppress(OSError):
                stack.enter_context(connected(port))
        time.sleep(seconds)
    return "left"


def large_head(port: int, random: Random) -> str:
    """A megabyte of headers."""
    if random.random() < 0.5:
        return exchange(port, head("GET", "/health", **{f"X{n}": "a" * 1000 for n in range(1000)}))
    return exchange(port, head("GET", "/" + "a" * 1_000_000))


def large_body(port: int, random: Random) -> str:
    """More bytes than may come, announced or not."""
    with connected(port) as connection:
        if random.random() < 0.5:
            send(connection, head("POST", CHAT, Content_Length=40_000_000))
            pieces = [b" " * 1_000_000] * 40
        else:
            send(connection, head("POST", CHAT, Transfer_Encoding="chunked"))
            pieces = [b"f4240\r\n" + b" " * 1_000_000 + b"\r\n"] * 40
        for piece in pieces:
            send(connection, piece)
        return status(connection)


def bad_length(port: int, random: Random) -> str:
    """A length that is none, or another than that of the body."""
    length = random.choice([-1, "x", "1, 2", 10**30, "0x10", 3, "", "٣".encode().decode("latin-1")])
    return exchange(port, head("POST", CHAT, Content_Length=length, Connection="close") + b"{}")


def noise(port: int, random: Random) -> str:
    """Bytes that are no HTTP, or hardly."""
    data = bytearray(post(CHAT, fields.example(CHAT), Connection="close"))
    for _ in range(random.choice((1, 3, 30))):
        data[random.randrange(min(len(data), 300))] = random.randrange(256)
    if random.random() < 0.2:
        data = bytearray(random.randbytes(2000))
    return exchange(port, bytes(data))


def pipelined(port: int, random: Random) -> str:
    """Several requests at once, the last one malformed or whole."""
    whole = post(random.choice(PATHS), random.choice(list(BODIES.values())))
    last = random.choice((b"\0\r\n\r\n", head("GET", "/health", Connection="close")))
    data = b""
    with connected(port) as connection:
        send(connection, whole * 3 + last)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                data += part
    statuses = re.findall(rb"HTTP/1.1 (\d{3}) ", data)
    if any(each.startswith(b"5") and each != b"503" for each in statuses):
        raise Wrong(f"{statuses}")
    return f"{len(statuses)} answers"


def foreign(port: int, random: Random) -> str:
    """A page of another site."""
    wrong = random.choice(({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}))
    return exchange(port, post(CHAT, fields.example(CHAT), **wrong))


def stray(port: int, random: Random) -> str:
    """An address or a method that there is not."""
    path = random.choice(["/", "/v1", "/v1/chat/completions/", "//", "/%00", "/../etc/passwd", "/?" + "a=b&" * 500])
    method = random.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "FOO"])
    return exchange(port, head(method, path, Content_Length=0))


DEEP = 10_000
BODIES = {
    "nothing": b"",
    "no JSON": b"{messages: 1}",
    "half": b'{"messages": [{"role": "user", "con',
    "not UTF-8": b'{"messages": "\xff\xfe"}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "NaN": b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    "Infinity": b'{"temperature": -Infinity}',
    "an exponent": b'{"temperature": 1e99999}',
    "digits": b'{"seed": ' + b"9" * 100_000 + b"}",
    "a lone surrogate": b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\udfff"}',
    "a surrogate as key": b'{"\\ud800": 1, "model": "demo"}',
    "lists": b"[" * DEEP + b"]" * DEEP,
    "deep in a field": b'{"model": "demo", "messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number": b"1",
    "a string": b'"messages"',
    "two values": b"{} {}",
    "a zero byte": b'{"model": "demo\\u0000", "messages": [{"role": "user", "content": "\\u0000"}]}',
}


def bad_json(port: int, random: Random) -> str:
    """A body that is no request."""
    return exchange(port, post(random.choice(PATHS), random.choice(list(BODIES.values()))))


def bad_field(port: int, random: Random) -> str:
    """Something wrong in one place."""
    path = random.choice(PATHS)
    place, value = random.choice(fields.places(path)), random.choice(fields.VALUES)
    body = fields.changed(fields.example(path), place, value)
    limits = {"max_tokens": 8, "max_output_tokens": 8} if random.random() < 0.9 and place[0] != "max_tokens" else {}
    return exchange(port, post(path, {**limits, **body}))


IMAGES = (
    "data:image/png;base64,AAA*",
    "data:image/png;base64,iQ==",
    # a PNG of 30,000×30,000 pixels, without samples
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAdTAAAHUwCAIAAADpRW/tAAAAAElEQVQ1rwYe",
    "data:application/pdf;base64,JVBERi0xLjcK",
    "data:,",
    "file:///etc/passwd",
    "../../etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost:22/",
    "gopher://127.0.0.1:6379/_x",
    "",
)


def bad_image(port: int, random: Random) -> str:
    """An image that is none, or that names what must stay closed."""
    body = fields.example(CHAT)
    part = {"type": "image_url", "image_url": {"url": random.choice(IMAGES)}}
    role = random.choice(("user", "user", "system"))
    body["messages"][0] = {"role": role, "content": [{"type": "text", "text": "What is it?"}, part]}
    return exchange(port, post(CHAT, body))


def many_images(port: int, random: Random) -> str:
    """A thousand images."""
    body = fields.example(CHAT)
    body["messages"][0]["content"] = body["messages"][0]["content"][-1:] * 1000
    return exchange(port, post(CHAT, body))


def left_stream(port: int, random: Random) -> str:
    """A stream that its client leaves."""
    with connected(port) as connection:
        send(connection, long_request(random))
        for _ in range(random.choice((0, 1, 3))):
            connection.recv(1000)
        time.sleep(random.choice((0, 0.05, 0.3)))
        if random.random() < 0.5:
            _reset_at_close(connection)
    return "left"


def left_whole(port: int, random: Random) -> str:
    """A question whose client leaves before the answer."""
    body = {**fields.example(CHAT), "max_tokens": 400, "ignore_eos": True}
    with connected(port) as connection:
        send(connection, post(CHAT, body))
        time.sleep(random.choice((0, 0.01, 0.1, 0.5)))
    return "left"


def slow_reader(port: int, random: Random, seconds: float = 5.0) -> str:
    """A stream of which one byte is taken at a time, and then no more."""
    with connected(port, SO_RCVBUF=2048) as connection:
        send(connection, long_request(random))
        end = time.monotonic() + random.random() * seconds
        while time.monotonic() < end and connection.recv(1):
            time.sleep(0.01)
        time.sleep(random.random() * seconds)
    return "left"


SEARCH = "/album/search"
QUERY = {"query": "a green cross"}
PLACES = (
    *("0", "1", "999", "-1", "1.0", "1e0", "x", "", "9" * 30, "9" * 5000, "%d9%a3", "%00", "1%00", "..%5c1", "1?a=b"),
    *("../../index.sqlite", "%2e%2e/%2e%2e/etc/passwd", "..", "/etc/passwd", "1/../../../etc/passwd", "%252e%252e"),
)


def left_search(port: int, random: Random) -> str:
    """A search that its client leaves."""
    with connected(port) as connection:
        send(connection, post(SEARCH, QUERY))
        if random.random() < 0.5:
            connection.recv(random.choice((1, 1000)))
        if random.random() < 0.5:
            _reset_at_close(connection)
    return "left"


def bad_search(port: int, random: Random) -> str:
    """A search with something wrong in one place, or that is none."""
    if random.random() < 0.2:
        return exchange(port, post(SEARCH, random.choice(list(BODIES.values()))))
    field = random.choice(("query", "top", "threshold", "since", "words", "other"))
    return exchange(port, post(SEARCH, {**QUERY, field: random.choice(fields.VALUES)}))


def wrong_picture(port: int, random: Random) -> str:
    """An address of a picture that there is not, or with another method."""
    path = f"/album/{random.choice(('thumbnails', 'pictures'))}/{random.choice(PLACES)}"
    return exchange(port, head(random.choice(("GET", "GET", "POST", "DELETE")), path, Content_Length=0))


def many_pictures(port: int, random: Random, number: int = 60) -> str:
    """Many pictures at once, of which some are not taken."""
    statuses = set()
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(port)) for _ in range(number)]
        for connection in waiting:
            send(connection, head("GET", f"/album/pictures/{random.randrange(1, 8)}", Connection="close"))
        for connection in waiting[: random.randrange(number)]:
            statuses.add(status(connection))
    return " ".join(sorted(statuses))


def foreign_album(port: int, random: Random) -> str:
    """A page of another site that wants to see the album."""
    wrong = random.choice(({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}))
    if random.random() < 0.5:
        got = exchange(port, post(SEARCH, QUERY, **wrong))
    else:
        got = exchange(port, head("GET", random.choice(("/album", "/album/thumbnails/1")), **wrong))
    if got != "403":
        raise Wrong(f"{wrong}: {got}, not 403")
    return got


def slow_searcher(port: int, random: Random, seconds: float = 5.0) -> str:
    """A search of which one byte is taken at a time, and then no more."""
    with connected(port, SO_RCVBUF=2048) as connection:
        send(connection, post(SEARCH, {**QUERY, "threshold": 0}))
        end = time.monotonic() + random.random() * seconds
        while time.monotonic() < end and connection.recv(1):
            time.sleep(0.01)
    return "left"


def _reset_at_close(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


CLIENTS: tuple[Client, ...] = (
    *(cut, half_closed, slow_head, slow_body, idle, large_head, large_body, bad_length, noise, pipelined, foreign),
    *(stray, bad_json, bad_field, bad_image, many_images, left_stream, left_whole, slow_reader),
    *(left_search, bad_search, wrong_picture, many_pictures, foreign_album, slow_searcher),
)
_SLOW = (slow_head, slow_body, idle, large_body, slow_reader, slow_searcher)
QUICK = tuple(client for client in CLIENTS if client not in _SLOW)
"""Those that take no time of their own."""
