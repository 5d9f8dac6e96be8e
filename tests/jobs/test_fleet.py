"""Several servers at work: what each gets, and what happens when one fails."""

import hashlib
import io
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, ServerError
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.jobs import exchange, fleet, keeper, peer
from fastvlm_mlx.jobs.asking import Asking, Record
from fastvlm_mlx.jobs.exchange import Address
from fastvlm_mlx.jobs.fleet import Fleet
from fastvlm_mlx.jobs.task import Task
from tests.jobs.fleets import MODEL, Server, answer_of, servers

TASK = Task(questions={"text": "What?"}, model="demo", weights="w" * 32, dtype="float32", keep_openings=True)
PICTURES = [
    (f"{number}.ppm", Encoded(b"P6 1 1 255\n" + bytes((number, 0, 0)), f"{number}.ppm")) for number in range(40)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds take milliseconds, but no server that is held up counts as silent."""
    monkeypatch.setattr(keeper, "_TICK", 0.02)
    monkeypatch.setattr(peer, "SILENT_SECONDS", 60.0)
    monkeypatch.setattr(peer, "_LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(peer, "_LONGEST_REST", 0.05)
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 60.0)


@contextmanager
def connected(running: list[Server], notes: list[str] | None = None, task: Task = TASK, **more: Any) -> Iterator[Fleet]:
    notify = (lambda _: None) if notes is None else notes.append
    with Fleet([server.address for server in running], notify=notify, **more) as asked:
        asked.start(task)
        yield asked


def run(running: list[Server], notes: list[str] | None = None, task: Task = TASK, **more: Any) -> list[Record]:
    with connected(running, notes, task, **more) as asked:
        return list(Asking(task).records(asked, PICTURES))


def is_right(records: list[Record]) -> bool:
    """Whether there is one record for each picture, in order, with its own answer."""
    expected = [(name, answer_of(encoded.data, "What?")) for name, encoded in PICTURES]
    return [(record["file"], record.get("text")) for record in records] == expected


def test_all_servers_answer_and_records_are_in_order() -> None:
    together = threading.Event()

    def wait_for_the_others(handler: Any, number: int) -> bool:
        if all(server.asked for server in running):
            together.set()
        together.wait(60)
        return False

    with servers(3) as running:
        for server in running:
            server.misbehave = wait_for_the_others
        assert is_right(run(running))
        assert sum(len(server.asked) for server in running) == len(PICTURES)
        assert all(server.asked for server in running)
        assert all(server.most <= 4 for server in running)  # two at a time, and two that wait


def test_a_faster_server_answers_more() -> None:
    enough = threading.Event()
    with servers(2) as (slow, fast):
        slow.misbehave = lambda handler, number: not enough.wait(60)
        fast.misbehave = lambda handler, number: number == 30 and enough.set() is not None
        assert is_right(run([slow, fast]))
        assert len(fast.asked) > 2 * len(slow.asked)


def test_the_questions_about_one_picture_go_to_one_server_one_after_another() -> None:
    task = Task(**{**vars(TASK), "questions": {"text": "What?", "a": "Who?", "b": "Why?"}})
    with servers(3) as running:
        for server in running:
            server.seconds = 0.002
        records = run(running, task=task)
        for record in records:
            (asked,) = [server.asked for server in running if any(each[0] == record["sha256"] for each in server.asked)]
            assert [text for sha256, text in asked if sha256 == record["sha256"]] == ["What?", "Who?", "Why?"]
            assert record["answers"]["b"].endswith("Why?")


def test_a_server_that_is_full_gets_less_and_nothing_is_lost() -> None:
    with servers(2) as (full, free):
        full.seconds = free.seconds = 0.01

        def refuse(handler: Any, number: int) -> bool:
            if full._now > 1:
                error = {"error": {"message": "the queue is full", "type": "rate_limit_error", "code": "queue_full"}}
                full.reply(handler, error, 429, retry_after="0.05")
                return True
            return False

        full.misbehave = refuse
        notes: list[str] = []
        assert is_right(run([full, free], notes))
        assert notes == []
        refused = len(full.asked) + len(free.asked) - len(PICTURES)
        assert 0 < refused <= 5 * (len(full.asked) - refused + 1)  # a few between two answers, not one each millisecond


def half(server: Server, handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def chunks_without_end(server: Server, handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"5\r\n{    \r\n")
    handler.close_connection = True


FAULTS = {
    "nothing": lambda server, handler: setattr(handler, "close_connection", True),
    "half an answer": half,
    "chunks without an end": chunks_without_end,
    "no HTTP": lambda server, handler: handler.wfile.write(b"hello\r\n\r\n"),
    "no JSON": lambda server, handler: server.reply(handler, b"<html>"),
    "a list": lambda server, handler: server.reply(handler, [1]),
    "no choices": lambda server, handler: server.reply(handler, server.answer("", choices=[])),
    "no text": lambda server, handler: server.reply(handler, server.answer(None)),
    "no reason": lambda server, handler: server.reply(
        handler, server.answer("", choices=[{"message": {"content": "a"}, "finish_reason": None}])
    ),
    "no usage": lambda server, handler: server.reply(handler, server.answer("a", usage=None)),
    "wrong counts": lambda server, handler: server.reply(
        handler, server.answer("a", usage={**server.answer("")["usage"], "completion_tokens": 10**9})
    ),
    "a bug": lambda server, handler: server.reply(handler, {"error": {"message": "bug", "code": "bug"}}, 500),
    "a redirect": lambda server, handler: server.reply(handler, b"", 301, location="http://127.0.0.1:1/"),
    "a proxy's error": lambda server, handler: server.reply(handler, b"Bad gateway", 502),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_loses_or_answers_wrongly_another_one_answers(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "_LONGEST_REST", 30.0)
    monkeypatch.setattr(fleet, "_MOST_LOSSES", 100)  # the good one may be held up
    with servers(2) as (bad, good):
        good.seconds = 0.003
        bad.misbehave = lambda handler, number: FAULTS[fault](bad, handler) is None
        notes: list[str] = []
        assert is_right(run([bad, good], notes))
        assert len(bad.asked) < 25  # it rests more and more
        assert any(str(bad.address) in note for note in notes) or len(bad.asked) < 12
        assert all("Traceback" not in note for note in notes)


def free_after(other: Server, count: int) -> Any:
    """Lets another server go on when one has been asked so often."""

    def free(handler: Any, number: int) -> bool:
        if number == count:
            other.goes_on.set()
        return False

    return free


def test_a_server_that_is_killed_and_started_again_is_used_again() -> None:
    with servers(2) as (first, second):
        first.seconds = second.seconds = 0.01
        notes: list[str] = []
        with connected([first, second], notes) as asked:
            records = []
            for record in Asking(TASK).records(asked, PICTURES * 3):
                records.append(record)
                if len(records) == 20:
                    first.kill()
                if len(records) == 50:
                    second.goes_on.clear()
                    first.misbehave = free_after(second, len(first.asked) + 6)
                    first.start()
            assert is_right(records[:40])
            assert is_right(records[80:])
        assert second.goes_on.is_set()
        assert "the others go on, and it is tried again" in notes[0]
        assert f"{first.address} answers again, after" in notes[-1]


def test_a_server_that_is_stopped_and_continued_is_left_out_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "SILENT_SECONDS", 0.15)
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.4)
    monkeypatch.setattr(fleet, "_MOST_LOSSES", 100)  # the other one may be held up
    with servers(2) as (first, second):
        first.seconds = second.seconds = 0.01
        notes: list[str] = []
        with connected([first, second], notes) as asked:
            records = []
            for record in Asking(TASK).records(asked, PICTURES * 2):
                records.append(record)
                if len(records) == 10:
                    first.goes_on.clear()
                if len(records) == 60:
                    first.goes_on.set()
            assert is_right(records[:40])
            assert is_right(records[40:])
        assert f"{first.address}: no answer in time; the others go on, and it is tried again" in notes


def test_all_servers_may_be_away_for_a_while() -> None:
    with servers(2) as running:
        notes: list[str] = []
        with connected(running, notes) as asked:
            records = []
            for record in Asking(TASK).records(asked, PICTURES):
                records.append(record)
                if len(records) == 5:
                    for server in running:
                        server.kill()
                    threading.Timer(0.15, lambda: [server.start() for server in running]).start()
            assert is_right(records)
        assert any(note.endswith("it is tried again") and "others" not in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system_fingerprint": "fp_2", "weights": "v" * 32}, "answers as fp_2, not fp_1 any more"),
        ({"system_fingerprint": "fp_2", "version": "9.9"}, "answers as fp_2, not fp_1 any more"),
    ],
)
def test_a_server_that_holds_something_else_now_is_left_out(change: dict[str, Any], message: str) -> None:
    with servers(2) as (first, second):
        second.seconds = 0.005
        notes: list[str] = []

        def exchange_model(handler: Any, number: int) -> bool:
            if number == 5:
                first.model = {**MODEL, **change}
            return False

        first.misbehave = exchange_model
        assert is_right(run([first, second], notes))
        assert len(first.asked) <= 10
        assert notes[0] == f"{first.address}: {message}; it is left out"


def test_a_question_that_every_server_is_lost_with_is_an_error_and_the_others_go_on() -> None:
    with servers(2) as running:
        poison = PICTURES[7][1].data

        def die(handler: Any, number: int) -> bool:
            handler.close_connection = True
            return any(each[0] == sha256 for each in handler_asked(handler)[-1:])

        sha256 = hashlib.sha256(poison).hexdigest()

        def handler_asked(handler: Any) -> list[tuple[str, str]]:
            return next(each.asked for each in running if each.port == handler.server.server_address[1])

        for server in running:
            server.misbehave = die
        records = run(running, most=1)
        assert [record["file"] for record in records if "error" in record] == ["7.ppm"]
        assert records[7]["error"]["message"].startswith("7.ppm: 5 servers were lost with it, the last one: ")
        assert is_right([*records[:7], {"file": "7.ppm", "text": answer_of(poison, "What?")}, *records[8:]])


def test_a_late_answer_is_asked_for_again_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_LATE_SECONDS", 0.1)
    with servers(2) as (slow, quick):
        released = threading.Event()
        slow.misbehave = lambda handler, number: number == 3 and released.wait(60) is None
        begun = time.monotonic()
        assert is_right(run([slow, quick]))
        assert time.monotonic() - begun < 50
        released.set()


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (400, {"code": "invalid_image", "param": "messages[0]"}, ("ImageError", "0.ppm: not an image")),
        (400, {"code": None}, ("ConfigError", "messages[0]: not an image")),
        (413, {"code": "too_large"}, ("ImageError", "0.ppm: is larger than the server takes; start it with a larger")),
    ],
)
def test_what_a_question_fails_for_is_its_error(status: int, error: dict[str, Any], expected: tuple[str, str]) -> None:
    with servers(1) as (server,):
        values = {"error": {"message": "messages[0]: not an image", "type": "invalid_request_error", **error}}
        server.misbehave = lambda handler, number: server.reply(handler, values, status) is None
        first = run([server])[0]
        assert first["error"]["type"] == expected[0]
        assert first["error"]["message"].startswith(expected[1])
        assert len(server.asked) == len(PICTURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "v" * 32}, "its weights vvvvvvvvvv"),
        ({"dtype": "float16"}, "its dtype float16 is not that of http://127.0.0.1:"),
        ({"version": "0.0.1"}, f"is of version 0.0.1, but this program of {keeper.__version__}"),
        ({"limits": None}, "is no server of fastvlm-mlx"),
        ({"limits": {**MODEL["limits"], "max_tokens": 64}}, "answers with at most 64 tokens, not 256; start it with"),
        ({"limits": {**MODEL["limits"], "max_resolution": 256}}, "pictures at up to 256 pixels; start it with --max-r"),
    ],
)
def test_servers_that_differ_are_refused_before_the_work_begins(change: dict[str, Any], message: str) -> None:
    task = Task(**{**vars(TASK), "resolution": 512, "config": GenerationConfig(max_tokens=256)})
    with servers(2) as (first, second):
        second.model = {**MODEL, **change}
        with pytest.raises(ServerError) as error:
            run([first, second], task=task)
        assert f"{second.address}: " in str(error.value)
        assert message in str(error.value)
        assert first.asked == second.asked == []


def test_servers_that_do_not_answer_at_first_are_noted_unless_none_does() -> None:
    with servers(2) as (first, second):
        second.kill()
        notes: list[str] = []
        assert is_right(run([first, second], notes))
        assert notes == [f"{second.address}: Connection refused; it is tried again"]
        first.kill()
        with pytest.raises(ServerError, match=r"no server answers: .*Connection refused.*; start them with `fastvlm"):
            run([first, second])


def test_a_model_that_is_still_loading_is_waited_for() -> None:
    with servers(1) as (server,):
        server.model = {**MODEL, "weights": None, "system_fingerprint": None}
        threading.Timer(0.1, lambda: setattr(server, "model", dict(MODEL))).start()
        assert is_right(run([server]))


def test_the_end_of_all_servers_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PATIENCE", 0.1)
    with servers(1) as (server,), connected([server]) as asked:
        records = Asking(TASK).records(asked, PICTURES)
        next(records)
        server.kill()
        with pytest.raises(CancelledError):
            list(records)
        assert "no server for 0 minutes: " in str(asked.failure)


def test_a_key_is_sent_and_in_no_message() -> None:
    key = "a-key-of-24-characters-1"
    with servers(2) as (first, second):
        notes: list[str] = []
        bad = {"error": {"message": "the key is not one of this server's", "code": "invalid_api_key"}}
        second.misbehave = lambda handler, number: second.reply(handler, bad, 401) is None
        assert is_right(run([first, second], notes, key=key))
        assert first.headers["Authorization"] == f"Bearer {key}"
        assert "answers 401: the key is not one of this server's; it is left out" in notes[0]
        assert not any(key in note for note in notes)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody has signed, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed")
    path = tmp_path_factory.mktemp("certificate") / "own.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", path, "-out", f"{path}.crt"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_https_needs_a_certificate_that_the_system_trusts(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers(1, certificate) as running:
        with pytest.raises(ServerError, match="its certificate is not trusted: self-signed certificate"):
            run(running)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert is_right(run(running))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://a:8000", "http://a:8000"),
        ("a:8000", "http://a:8000"),
        ("https://a/x/v1/", "https://a:443/x"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        (" 10.0.0.2 ", "http://10.0.0.2:80"),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, expected: str) -> None:
    assert str(Address.parse(text)) == expected


@pytest.mark.parametrize("text", ["", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://a?b", "a b", "é"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        Address.parse(text)


def test_an_address_with_a_key_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as error:
        Address.parse("http://me:secret@a")
    assert "secret" not in str(error.value)


def test_the_body_of_a_question_holds_all_that_its_answer_depends_on() -> None:
    task = Task(
        **{
            **vars(TASK),
            "system": "Be brief.",
            "background": "white",
            "sentence": True,
            "max_words": 9,
            "prefix": "A",
            "config": GenerationConfig(max_tokens=5, temperature=0.5, top_p=0.5, seed=1, stop="x", logit_bias={5: 1}),
        }
    )
    bodies = []
    with servers(1) as (server,):
        post = server.post

        def keep(handler: Any) -> None:
            data = handler.rfile.read(int(handler.headers["content-length"]))
            bodies.append(json.loads(data))
            handler.rfile = io.BytesIO(data)
            post(handler)

        server.post = keep  # type: ignore[method-assign]
        with connected([server], task=task) as asked:
            next(Asking(task).records(asked, PICTURES[:1]))
    body = bodies[0]
    (system, user) = body.pop("messages")
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"][1] == {"type": "text", "text": "What?"}
    assert body == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 1,
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "resolution": 192,
        "background": "white",
        "prefix": "A",
        "sentence": True,
        "max_words": 9,
    }
