"""Pictures from servers whose answers are damaged, late, or lead elsewhere."""

import gzip
import socket
import threading
import time
from random import Random

from tests.fuzz import damage
from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import Wrong, look_at

TIMEOUT = 0.5
"""Seconds that a fetch may take."""

_STATUS = (
    *(
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 200",
        b"HTTP/1.1 206 x",
        b"HTTP/1.1 404 \x1b[2J",
        b"ICY 200 OK",
    ),
    *(b"HTTP/1.1 999999999999", b"HTTP/9.9 200 OK", b"HTTP/1.1 -1 x", b"HTTP/1.1 204 x", b"HTTP/1.1 100 Continue", b""),
)
_PLACES = (
    *(b"/again", b"", b"file:///etc/passwd", b"ftp://127.0.0.1:1/x", b"data:image/png;base64,AAAA", b"http://[::1]:x/"),
    *(b"//127.0.0.1:1/x.png", b"http://\x00/", b"/\xff\xfe", b"/" + b"a" * 9000, b"http://127.0.0.1:1/", b"?\r\n x"),
)
_FIELDS = (
    *(b"Content-Type: text/html", b"Content-Type: image/png; charset=\x1b[2J", b"Content-Type: " + b"a" * 9000),
    *(b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Transfer-Encoding: nonsense", b"Content-Type:"),
    *(b"X: " + b"a" * 70_000, b"no colon here", b" folded", b"\xff\xfe: \xff", b": x", b"Set-Cookie: a=b"),
    b"\r\n".join([b"A: b"] * 200),
)


def _answer(random: Random) -> bytes:
    picture = files()["PNG RGB 4"]
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(picture), picture)
    body = random.choice(
        (*(picture,) * 3, picture[:99], b"", b"<html>", gzip.compress(picture), chunked, b"zz\r\n", chunked[:90])
    )
    fields = [random.choice(_FIELDS) for _ in range(random.choice((0, 0, 0, 1, 2)))]
    length = random.choice((*(len(body),) * 5, len(body) - 1, len(body) + 9, -1, 10**30, b"x", None))
    if length is not None:
        fields.append(b"Content-Length: " + (length if isinstance(length, bytes) else str(length).encode()))
    status = random.choice(_STATUS)
    if random.random() < 0.2:
        status = random.choice((b"HTTP/1.1 302 x", b"HTTP/1.1 301 x", b"HTTP/1.1 307 x", b"HTTP/1.1 300 x"))
        fields.append(b"Location: " + random.choice(_PLACES))
    answer = b"\r\n".join([status, *fields, b"", body])
    return damage.some_bytes(random, answer) if random.random() < 0.2 else answer


def _serve(listening: socket.socket, answer: bytes, pause: float) -> None:
    """Gives every connection the same answer, at once or byte by byte, until the socket is closed."""
    while True:
        try:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                step = 1 if pause else len(answer)
                for start in range(0, len(answer), max(1, step)):
                    connection.sendall(answer[start : start + step])
                    time.sleep(pause)
        except OSError:
            if listening.fileno() < 0:
                return


def server(random: Random, room: Room) -> None:
    """A picture from a server."""
    answer, pause = _answer(random), random.choice((*(0.0,) * 12, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_serve, args=(listening, answer, pause), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        start = time.monotonic()
        try:
            look_at(address + random.choice(("", "/x.png", "/é \x1b", "/%00?x#y", "/" + "a" * 3000)), timeout=TIMEOUT)
        finally:
            seconds = time.monotonic() - start
            listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    if seconds > 20 * TIMEOUT:
        raise Wrong(f"late: {seconds:.1f} s for a fetch of at most {TIMEOUT} s")
