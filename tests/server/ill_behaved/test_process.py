"""A real process of the server: killed in the middle of its work, it leaves nothing that the next one stumbles over."""

import contextlib
import signal
import threading
from random import Random

from tests.server.ill_behaved import fields
from tests.server.ill_behaved.clients import CHAT, exchange, left_whole, long_request, post
from tests.stress.serving import free_port, start_server


def test_after_kill_9_under_load_the_next_server_takes_the_port_and_answers(tmp_path):
    port, log = free_port(), tmp_path / "log"
    process = start_server(port, log)
    try:
        asking = [threading.Thread(target=_ask, args=(port, number)) for number in range(6)]
        for thread in asking:
            thread.start()
        left_whole(port, Random(0))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        for thread in asking:
            thread.join()
        process = start_server(port, log)
        assert exchange(port, post(CHAT, fields.example(CHAT))) == "200"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("ready: demo") == 2


def _ask(port, number):
    """A stream that the kill cuts."""
    with contextlib.suppress(OSError):
        exchange(port, long_request(Random(number), 1000))
