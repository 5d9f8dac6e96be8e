"""A server over real sockets, among clients that no server should have."""

import contextlib
import logging
import shutil
import threading
import time
from random import Random

import pytest

from fastvlm_mlx.server.album import ServedAlbum
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.run import Running
from fastvlm_mlx.server.sockets import listen
from tests.server.conftest import SAMPLES, slow_down
from tests.server.ill_behaved import fields
from tests.server.ill_behaved.clients import (
    CHAT,
    CLIENTS,
    QUERY,
    QUICK,
    SEARCH,
    connected,
    exchange,
    idle,
    large_body,
    left_search,
    left_stream,
    long_request,
    post,
    send,
    slow_body,
    slow_head,
    slow_searcher,
)


@pytest.fixture(scope="module")
def server(serving, tmp_path_factory):
    """The port of a server with an album that is patient for a moment only, and its service."""
    folder = tmp_path_factory.mktemp("album") / "pictures"
    folder.mkdir()
    for sample in SAMPLES.glob("sample-*.png"):
        shutil.copy(sample, folder)
    album = ServedAlbum(folder, folder.parent / "index.sqlite")
    limits = {"head_seconds": 0.3, "body_seconds": 1.0, "send_seconds": 0.5, "max_body_bytes": 2_000_000}
    with serving(port=0, max_tokens=400, album=album, **limits) as (_, service):
        sockets = listen(service.settings)
        with Running(make_app(service, service.settings), service, service.settings, sockets):
            yield sockets[0].getsockname()[1], service


def settle(service):
    """Waits until nobody is answered any more."""
    end = time.monotonic() + 60
    while service.running or service.engine.answering:
        assert time.monotonic() < end, "rows are left"
        time.sleep(0.01)


def answers(port):
    """Whether a question is answered; asked again if it was held up for longer than the server is patient."""
    return any(exchange(port, post(CHAT, fields.example(CHAT))) == "200" for _ in range(10))


@pytest.mark.parametrize("client", QUICK, ids=lambda client: client.__name__)
def test_no_client_gets_a_5xx_or_harms_the_next(server, client, caplog):
    port, service = server
    for seed in range(8):
        client(port, Random(seed))
    assert answers(port)
    settle(service)
    assert not [record for record in caplog.records if record.exc_info]


def test_what_comes_byte_by_byte_ends_at_its_deadline(server):
    port, _ = server
    start = time.monotonic()
    assert slow_head(port, Random(0)) in ("408", "closed")
    assert slow_body(port, Random(0)) in ("408", "closed")
    assert time.monotonic() - start < 120  # all of each would take hours


@pytest.mark.parametrize("seed", range(2))
def test_a_body_beyond_the_limit_is_refused_and_its_client_hears_of_it(server, seed):
    assert large_body(server[0], Random(seed)) in ("413", "closed")


def test_a_thousand_idle_connections_leave_room(server):
    port, _ = server
    waiting = threading.Thread(target=idle, args=(port, Random(0), 1000, 0.2))
    waiting.start()
    assert all(answers(port) for _ in range(3))
    waiting.join()
    assert answers(port)


def test_a_client_that_takes_a_byte_at_a_time_holds_nothing_but_its_connection(server):
    port, service = server
    with connected(port, SO_RCVBUF=2048) as connection:
        send(connection, long_request(Random(0), 100))
        assert connection.recv(1)
        settle(service)  # the answer is whole, though almost nothing of it has been taken
        assert answers(port)


def test_a_client_that_leaves_frees_its_row_at_the_next_step(server, monkeypatch):
    port, service = server
    monkeypatch.setattr(service.engine._worker, "_step", service.engine._worker._step)  # restores it
    steps = slow_down(service.engine)
    for seed in range(4):
        left_stream(port, Random(seed))
    before = len(steps)
    settle(service)
    assert len(steps) - before < 200  # of 400, in 12 seconds


def test_searches_that_are_not_read_or_left_leave_room_for_others(server):
    port, _ = server
    slow = [threading.Thread(target=slow_searcher, args=(port, Random(seed), 1.0)) for seed in range(4)]
    for thread in slow:
        thread.start()
    for seed in range(20):
        left_search(port, Random(seed))
    for thread in slow:
        thread.join()
    deadline = time.monotonic() + 30
    while (found := exchange(port, post(SEARCH, QUERY))) == "429":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found == "200"


def test_every_refusal_is_in_the_log_with_its_reason(server, caplog):
    port, _ = server
    with caplog.at_level(logging.WARNING, "fastvlm_mlx.server"):
        for client in QUICK:
            client(port, Random(1))
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    for line in lines:
        assert line.isprintable()
        assert len(line) < 600
    assert any(("403 POST" in line and "evil.example" in line) or "null" in line for line in lines)


def test_bad_clients_all_at_once_do_not_touch_the_answers_of_good_ones(server, caplog):
    """Each client gets its own answer, the same as without them."""
    port, service = server
    expected = _answer(port)
    failures = []
    threads = [
        threading.Thread(target=_run, args=(client, port, failures))
        for client in CLIENTS
        if client.__name__ not in ("slow_head", "slow_body", "slow_reader", "slow_searcher")
    ]
    for thread in threads:
        thread.start()
    found = [_answer(port) for _ in range(5)]
    for thread in threads:
        thread.join()
    assert found == [expected] * 5
    assert not failures
    settle(service)
    assert not [record for record in caplog.records if record.exc_info]


def _run(client, port, failures):
    try:
        client(port, Random(7))
    except (AssertionError, OSError) as error:
        failures.append(f"{client.__name__}: {error!r}")


def _answer(port):
    """The answer to a question; asked again if it was held up for longer than the server is patient."""
    for _ in range(10):
        with connected(port) as connection:
            send(connection, post(CHAT, fields.example(CHAT), Connection="close"))
            data = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    data += part
        if data.startswith(b"HTTP/1.1 200 "):
            break
    return data.partition(b'"content":"')[2].partition(b'"')[0]
