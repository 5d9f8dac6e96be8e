"""Connections of clients that send slowly, wrongly or nothing, and that take nothing."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time

import pytest
import uvicorn

from fastvlm_mlx.server.protocol import HEAD_BYTES, http_class
from fastvlm_mlx.server.settings import Settings


@contextlib.contextmanager
def listening(app, **settings):
    """The port of a server of `app` in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=http_class(Settings(**settings)),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_keep_alive=5,
            )
        )
        thread = threading.Thread(target=asyncio.run, args=(server.serve([sock]),))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield sock.getsockname()[1]
        finally:
            server.force_exit = server.should_exit = True
            thread.join()


async def hello(scope, receive, send):
    """Answers at once; reads no body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def reader(scope, receive, send):
    """Answers when the body is there, or with nothing when the connection ended before."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.request":
        await hello(scope, receive, send)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 60)


def received(connection):
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def is_greeted(connection):
    """Whether an answer of `hello` comes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while not data.endswith(b"hello") and (part := connection.recv(1000)):
            data += part
    return data.endswith(b"hello")


def send(connection, data):
    """Sends; the server may have ended the connection of a client that was held up."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


def trickle(connection, data):
    """Sends byte by byte."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def again_and_again():
    """Yields until it is left: a server's clock may end a connection before a client that is held up sends."""
    end = time.monotonic() + 60
    while True:
        yield
        assert time.monotonic() < end


def exchange(port, data):
    with connect(port) as connection:
        connection.sendall(data)
        return received(connection)


PLAIN = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def quick():
    """A server whose clocks end soon."""
    with listening(reader, head_seconds=0.2, send_seconds=0.2) as port:
        yield port


@pytest.fixture(scope="module")
def patient():
    """A server that waits for a client that is held up."""
    with listening(reader, head_seconds=60, send_seconds=60) as port:
        yield port


def test_several_requests_share_a_connection(patient):
    with connect(patient) as connection:
        for _ in range(3):
            connection.sendall(PLAIN)
            assert is_greeted(connection)


def test_a_connection_that_sends_nothing_ends(quick):
    with connect(quick) as connection:
        assert received(connection) == b""


@pytest.mark.parametrize("before", [b"", PLAIN])
def test_a_head_that_comes_byte_by_byte_ends_at_its_deadline(quick, before, caplog):
    for _ in again_and_again():
        with connect(quick) as connection:
            send(connection, before)
            if not before or is_greeted(connection):
                with pytest.raises(ConnectionError):
                    trickle(connection, PLAIN * 10)
        if "refused 408 - from 127.0.0.1:" in caplog.text:
            break
    assert "the head was not complete after 0.2 s" in caplog.text


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no version": b"GET /\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "length and chunks": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\nabc",
    "a header without a colon": b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "a control character": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_gets_400_in_json_and_one_line_in_the_log(patient, name, caplog):
    answer = exchange(patient, MALFORMED[name])
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n"), answer
    assert json.loads(body)["error"]["message"]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert caplog.records[-1].getMessage().startswith("refused 400 - from 127.0.0.1:")


def test_a_megabyte_of_headers_is_refused(patient):
    data = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: %b\r\n" % (b"a" * 1000) * 1000
    with connect(patient) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        answer = received(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")  # a reset may overtake the answer


def test_a_body_that_is_malformed_ends_the_request(patient, caplog):
    data = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    assert exchange(patient, data).startswith(b"HTTP/1.1 400 ")
    assert not [record for record in caplog.records if record.exc_info]


def test_a_malformed_request_after_an_answer_does_not_harm_it(patient, caplog):
    answer = exchange(patient, PLAIN + b"\x00\x01\x02\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"hello" in answer
    assert b"HTTP/1.1 400 " in answer
    assert not [record for record in caplog.records if record.exc_info]


def test_a_websocket_is_answered_like_any_request(patient, caplog):
    data = CLOSING.replace(b"Connection: close", b"Connection: close, Upgrade\r\nUpgrade: websocket")
    assert exchange(patient, data).endswith(b"hello")
    assert not caplog.records


def test_a_refused_body_is_dropped_for_a_moment_only():
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n"
    with listening(hello, head_seconds=60) as port, connect(port) as connection:
        connection.sendall(head + b"x" * 1_000_000)
        assert is_greeted(connection)
        connection.sendall(b"x" * 2_000_000 + PLAIN)  # the whole body came: the connection can go on
        assert is_greeted(connection)
    with listening(hello, head_seconds=0.3) as port:
        for _ in again_and_again():
            start = time.monotonic()
            with connect(port) as connection:
                send(connection, head + b"x")
                if received(connection).endswith(b"hello"):
                    break
        assert time.monotonic() - start > 0.2


def test_a_client_that_takes_nothing_loses_its_connection_and_the_rest_of_its_answer():
    ended = threading.Event()

    async def flood(send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)

    async def app(scope, receive, send):
        flooding = asyncio.create_task(flood(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        flooding.cancel()
        ended.set()

    with listening(app, head_seconds=60, send_seconds=0.2) as port, connect(port) as connection:
        connection.sendall(PLAIN)
        assert ended.wait(60)


def test_idle_connections_make_room_for_new_ones():
    with listening(hello, max_connections=20, head_seconds=60) as port, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(port)) for _ in range(100)]
        assert exchange(port, CLOSING).endswith(b"hello")
        end = time.monotonic() + 30
        while sum(_is_open(connection) for connection in idle) > 20:
            assert time.monotonic() < end
            time.sleep(0.01)


def _is_open(connection):
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_a_request_on_its_way_keeps_its_connection_however_many_come():
    proceed = threading.Event()
    arrived = []

    async def app(scope, receive, send):
        arrived.append(scope)
        while not proceed.is_set():
            await asyncio.sleep(0.01)
        await hello(scope, receive, send)

    with listening(app, max_connections=5, head_seconds=60) as port, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(port)) for _ in range(5)]
        for connection in busy:
            connection.sendall(PLAIN)
        while len(arrived) < 5:
            time.sleep(0.01)
        for _ in again_and_again():
            with connect(port) as connection:
                send(connection, CLOSING)
                answer = received(connection)
            if answer:
                break
        assert answer.startswith(b"HTTP/1.1 503 ")
        proceed.set()
        assert all(is_greeted(connection) for connection in busy)
