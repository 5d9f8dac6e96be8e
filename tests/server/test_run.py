"""A server from its start to its end, over real sockets."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.run import Running, serve
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import listen
from tests.server.conftest import SLOW, hold_after

PATH = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True, "max_tokens": 300, "stream": True}


@pytest.fixture
def ask():
    """`ask(port, method, path, body)`: a response whose body has yet to be read."""
    connections = []

    def send(port, method, path, body=None):
        connections.append(http.client.HTTPConnection("127.0.0.1", port, timeout=60))
        connections[-1].request(method, path, None if body is None else json.dumps(body))
        return connections[-1].getresponse()

    yield send
    for connection in connections:
        connection.close()


@contextmanager
def running(serving, **options):
    """A server over a real socket: its port, itself and its service."""
    with serving(port=0, **options) as (_, service):
        sockets = listen(service.settings)
        port = sockets[0].getsockname()[1]
        with Running(make_app(service, service.settings), service, service.settings, sockets) as server:
            yield port, server, service


def test_answers_on_their_way_end_before_the_server_does(serving, ask):
    with running(serving) as (port, server, service):
        go_on = hold_after(service.engine, 3)
        answer = ask(port, "POST", PATH, LONG)
        first = answer.readline()
        server.stop()
        while service.state == "ready":
            time.sleep(0.005)
        assert ask(port, "GET", "/ready").status == 503
        assert ask(port, "GET", "/health").status == 200
        refused = ask(port, "POST", PATH, LONG)
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert b"the server is stopping" in refused.read()
        go_on.set()
        events = (first + answer.read()).decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.wait()
    with pytest.raises(ConnectionRefusedError):
        ask(port, "GET", "/ready")


def test_after_the_time_to_drain_an_answer_ends_with_an_error(serving, ask):
    with running(serving, drain_seconds=0.05, step_seconds=SLOW) as (port, server, _):
        answer = ask(port, "POST", PATH, {**LONG, "max_tokens": 1900})
        answer.readline()
        server.stop()
        last = answer.read().decode().split("\n\n")[-2].strip()
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
        server.wait()


def test_an_idle_server_does_nothing_at_all(serving, ask):
    """Its event loop does not even wake up."""
    with running(serving) as (port, server, _):
        assert ask(port, "GET", "/ready").read()
        selector, woken = server._loop._selector, [None]
        select = selector.select
        selector.select = lambda timeout=None: woken.append(timeout) or select(timeout)
        deadline = time.monotonic() + 60
        while woken:  # what the request has left to do may take a while
            assert time.monotonic() < deadline
            woken.clear()
            time.sleep(0.5)


def test_it_listens_before_the_model_is_there_and_ends_if_it_never_is(ask):
    settings, seen, lines = Settings(port=0), [], []
    service = Service("demo", settings)

    def load():
        port = int(lines[0].rpartition(":")[2])
        for method, path in (("POST", PATH), ("GET", "/ready"), ("GET", "/health"), ("GET", "/v1/models")):
            seen.append(ask(port, method, path, LONG if method == "POST" else None).status)
        raise CheckpointError("demo: is damaged")

    with pytest.raises(CheckpointError, match="demo: is damaged"):
        serve(make_app(service, settings), service, settings, load, notify=lines.append)
    assert seen == [503, 503, 200, 200]
    assert len(lines) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "fastvlm-server"]


@pytest.fixture
def process(tmp_path):
    """`process(*options)`: a server as its user starts it, and its port."""
    started = []

    def start(*options):
        log = (tmp_path / "log").open("w")
        command = [sys.executable, "-m", "fastvlm_mlx", "serve", "demo", "--port", "0", "--no-warmup", *options]
        started.append(subprocess.Popen(command, stderr=log, env={**os.environ, "FASTVLM_API_KEY": ""}))
        log.close()
        for _ in range(1200):
            lines = (tmp_path / "log").read_text().splitlines()
            if lines and lines[-1].startswith("ready: demo"):
                return started[-1], int(lines[0].rpartition(":")[2])
            time.sleep(0.05)
        raise AssertionError(lines)

    yield start
    for each in started:
        each.kill()
        each.wait()


def test_a_signal_ends_the_server_in_order(process, tmp_path, ask):
    server, port = process()
    assert ask(port, "POST", PATH, {**LONG, "stream": False, "max_tokens": 3}).status == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == f"listening on http://127.0.0.1:{port}"
    # A client may have its answer a moment before the server counts it as given.
    assert lines[-2:] in (["stopping; 0 on their way", "stopped"], ["stopping; 1 on their way", "stopped"])


def test_a_second_signal_ends_it_at_once(process, ask):
    server, port = process("--max-batch", "1", "--drain-seconds", "3600")
    answer = ask(port, "POST", PATH, {**LONG, "max_tokens": 1900, "n": 16})  # a minute, one after the other
    answer.readline()
    server.send_signal(signal.SIGTERM)
    while ask(port, "GET", "/ready").status == 200:
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 128 + signal.SIGTERM  # 0, had it drained
