"""The background server itself: its start, its end, and what it does when things go wrong."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.warm.client import Holding, find_warm, program, status
from fastvlm_mlx.warm.place import Place
from fastvlm_mlx.warm.wire import line, piece_record
from tests.checkpoints import APPLE, changed
from tests.conftest import Converted
from tests.warm.background import COMMAND, DEMO, background, environment, fastvlm, place_in, until

PICTURE = str(DEMO / "sample-1.png")
ANSWER = b"A green triangle, a black cross and a green cross.\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which a background server holds the demo model."""
    cache = tmp_path_factory.mktemp("cache")
    with background(cache, "demo"):
        yield cache


def test_status_says_what_is_held_and_for_how_long(cache: Path) -> None:
    done = fastvlm(cache, "status", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0
    assert (said["running"], said["state"], said["model"]) == (True, "ready", "demo")
    assert said["pid"] == place_in(cache).holder()
    assert 0 < said["ends_in_seconds"] <= 1800
    assert fastvlm(cache, "status").stdout.startswith(b"state     ready\nmodel     demo, computes in float32\n")


def test_a_second_start_says_that_the_model_is_warm(cache: Path) -> None:
    holder = place_in(cache).holder()
    done = fastvlm(cache, "serve", "demo", "--background")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == f"demo is warm already, in process {holder}\n"


def test_another_model_is_refused_while_one_is_warm(cache: Path) -> None:
    done = fastvlm(cache, "serve", str(APPLE / "reparam"), "--background")
    assert done.returncode == 1
    holder = place_in(cache).holder()
    message = f"error: a background server keeps demo warm already (process {holder}); `fastvlm stop` ends it\n"
    assert done.stderr.decode() == message


def test_the_client_imports_neither_mlx_nor_numpy_nor_the_server(cache: Path) -> None:
    code = """
import json, sys
sys.argv = ["fastvlm", *json.loads(sys.argv[1])]
from fastvlm_mlx.cli import main
try:
    main()
finally:
    sys.stderr.write(json.dumps(sorted(sys.modules)))
"""
    for arguments, stdin in (
        (["generate", PICTURE, "-m", "demo", "-r", "64", "--background", "white", "-v"], b""),
        (["generate", "-", "-m", "demo", "--choice", "yes", "--choice", "no"], Path(PICTURE).read_bytes()),
        (["chat", PICTURE, "-m", "demo", "-v"], b"What is it?\n/set temperature=0.5\n/tokens\nAnd now?\n"),
    ):
        command = [COMMAND[0], "-c", code, json.dumps(arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment(cache))
        assert done.returncode == 0
        assert done.stdout
        modules = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
        assert not modules & {"mlx", "numpy", "starlette", "uvicorn", "tokenizers", "asyncio", "pydantic"}
        assert "fastvlm_mlx" in modules


def test_the_server_is_reached_on_its_socket_as_any_server_is(cache: Path) -> None:
    with place_in(cache).connect(60.0) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["data"][0]["id"] == "demo"


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[1]\n", b'{"images": []}\n', b"\xff\n"])
def test_a_damaged_question_harms_nobody(cache: Path, body: bytes) -> None:
    for path in (b"/warm/ask", b"/warm/hello", b"/warm/nothing"):
        with place_in(cache).connect(60.0) as connection:
            connection.sendall(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body))
            head, _, answer = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
            assert head.split()[1] in (b"400", b"404") or answer == b'{"holds": false}\n'
    assert fastvlm(cache, "generate", PICTURE, "-m", "demo").stdout == ANSWER


def test_a_checkpoint_that_has_changed_is_not_held_any_more(tmp_path: Path, converted: Converted) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(converted("apple"), folder)
    with background(tmp_path, str(folder)):
        place, holding = place_in(tmp_path), Holding(model=str(folder))
        assert find_warm(holding, place) is not None
        assert find_warm(Holding(model=str(folder), dtype="float16"), place) is None
        os.utime(folder / "model.safetensors")
        assert find_warm(holding, place) is None


@pytest.fixture
def slow(tmp_path: Path, converted: Converted) -> Iterator[tuple[Path, list[str], int]]:
    """A server whose answers are long: its cache folder, a command line and its process."""
    folder = str(changed(converted("apple"), tmp_path / "model", config={"eos_token_id": [5]}))  # which it never says
    with background(tmp_path, folder) as holder:
        question = ["generate", str(APPLE / "images" / "square.png"), "-m", folder, "-n", "1800"]
        yield tmp_path, question, holder


def begun(cache: Path, question: list[str]) -> "subprocess.Popen[bytes]":
    """A command that has written the beginning of its answer."""
    process = subprocess.Popen(
        [*COMMAND, *question], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(cache)
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_a_server_that_is_killed_in_the_middle_of_an_answer_is_named(slow: tuple[Path, list[str], int]) -> None:
    cache, question, holder = slow
    with begun(cache, question) as process:
        os.kill(holder, signal.SIGKILL)
        _, stderr = process.communicate(timeout=180)
    assert process.returncode == 1
    assert stderr.startswith(b"error: the background server ")
    assert stderr.count(b"\n") == 1
    assert fastvlm(cache, "status").returncode == 3
    with background(cache, question[3]):  # in the place of the stale socket
        assert status(place_in(cache)) is not None


def test_an_interrupt_frees_the_row(slow: tuple[Path, list[str], int]) -> None:
    cache, question, holder = slow
    code = 0
    while code == 0:  # the answer was whole before the server was stopped
        with begun(cache, question) as process:
            os.kill(holder, signal.SIGSTOP)  # or the answer might be whole before the interrupt comes
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
        os.kill(holder, signal.SIGCONT)
    assert code == 130
    until(lambda: (status(place_in(cache)) or {}).get("answering") == 0)


def test_a_reader_that_leaves_frees_the_row_and_is_no_error(slow: tuple[Path, list[str], int]) -> None:
    cache, question, _ = slow
    with begun(cache, question) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    until(lambda: (status(place_in(cache)) or {}).get("answering") == 0)


def test_an_answer_on_its_way_may_end_when_the_server_is_stopped(slow: tuple[Path, list[str], int]) -> None:
    cache, question, holder = slow
    question = [*question[:-1], "400"]  # which is whole before the patience of the server's end
    whole = fastvlm(cache, *question, "--no-warm").stdout
    with begun(cache, question) as process:
        done = fastvlm(cache, "stop")
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert whole.endswith(rest)
    assert (done.returncode, done.stderr.decode()) == (0, f"ended (process {holder})\n")
    assert place_in(cache).holder() is None
    assert not place_in(cache).socket_file.exists()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_does_not_react_is_killed(
    slow: tuple[Path, list[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastvlm_mlx.cli import background as module

    cache, _, holder = slow
    monkeypatch.setattr(module, "_DRAIN_SECONDS", 0.2)
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    os.kill(holder, signal.SIGSTOP)
    assert find_warm(Holding(model="demo"), place_in(cache)) is None
    assert module.end(place_in(cache)) == holder
    assert place_in(cache).holder() is None


def test_without_a_server_stop_and_status_say_so(tmp_path: Path) -> None:
    stopped, state = fastvlm(tmp_path, "stop"), fastvlm(tmp_path, "status", "--json")
    assert (stopped.returncode, stopped.stderr) == (0, b"no background server runs\n")
    assert (state.returncode, json.loads(state.stdout)["running"]) == (3, False)
    assert list(tmp_path.iterdir()) == []


def test_of_two_starts_at_once_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    command = [*COMMAND, "serve", "demo", "--background"]
    fastvlm(tmp_path, "generate", "-p", "Hello", "-n", "1", "-m", "demo")  # converts it
    starts = [subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(tmp_path)) for _ in range(2)]
    said = [start.communicate(timeout=180)[1].decode() for start in starts]
    try:
        assert sorted(start.returncode for start in starts) in ([0, 1], [0, 0])
        assert sum("demo is warm: process" in text for text in said) == 1, said
        others = [text for text in said if "demo is warm: process" not in text]
        assert "already" in others[0] or "at the same time" in others[0]
    finally:
        fastvlm(tmp_path, "stop")


def test_a_server_ends_by_itself_when_nobody_asks(tmp_path: Path) -> None:
    with background(tmp_path, "demo", "--idle", "0.05"):
        assert fastvlm(tmp_path, "generate", PICTURE, "-m", "demo").stdout == ANSWER
        until(lambda: place_in(tmp_path).holder() is None)
        assert not place_in(tmp_path).socket_file.exists()


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_start(tmp_path: Path) -> None:
    done = fastvlm(tmp_path, "serve", "nowhere", "--background")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: nowhere: no such folder or .zip")
    (tmp_path / "warm").chmod(0o755)
    done = fastvlm(tmp_path, "serve", "demo", "--background")
    assert done.returncode == 1
    assert b"nobody else can open" in done.stderr


@pytest.mark.parametrize("options", [("--port", "1"), ("--api-key-file", "x"), ("--unix-socket", "s"), ("-n", "5")])
def test_options_for_other_programs_mean_nothing_in_the_background(tmp_path: Path, options: tuple[str, str]) -> None:
    done = fastvlm(tmp_path, "serve", "demo", "--background", *options)
    assert done.returncode == 2
    assert b"would change nothing with --background" in done.stderr
    assert fastvlm(tmp_path, "serve", "demo", "--idle", "5").returncode == 2


Answers = Callable[[socket.socket, bytes], None]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the demo model, and without a server."""
    folder = tmp_path_factory.mktemp("empty")
    assert fastvlm(folder, "generate", "-m", "demo", "-p", "Hello", "-n", "1").returncode == 0
    return folder


@pytest.fixture
def pretend(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Asks a server that holds everything, and ends its answers as a test wants it."""
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(empty))
    place = place_in(empty)
    place.make()
    listener = place.listen()
    hello = {"holds": True, "pid": 1, "weights": "w", "dtype": "float32", "max_batch": 4, "slow": ""}

    def ask(answer: Answers, *options: str) -> Result:
        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    head = connection.recv(65536)
                    if b"/warm/hello" in head:
                        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + line({**hello, **program()}))
                    else:
                        answer(connection, head)

        threading.Thread(target=run, daemon=True).start()
        return CliRunner().invoke(app, ["generate", PICTURE, "-m", "demo", *options])

    yield ask
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def piece(text: str, reason: str | None = None) -> bytes:
    timings = Timings(preprocess=0.0, ttft=0.0, decode=0.0, total=0.0)
    result = GenerationResult(
        text=text,
        token_ids=(1,),
        prompt_tokens=1,
        visual_tokens=0,
        generated_tokens=1,
        finish_reason=reason,
        timings=timings,
    )
    return line({**piece_record(result), "peak_memory": 1})


OK = b"HTTP/1.1 200 OK\r\n\r\n"
UNSEEN: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 2",
    "no room": b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}",
    "no answer": OK,
    "images seen": OK + line({"seen": True}),
    "no JSON": OK + b"nonsense\n",
    "no object": OK + b"[]\n",
    "another form": OK + b'{"piece": {}}\n',
    "a queue that is full": OK + line({"error": {"type": "QueueFullError", "message": "the queue is full"}}),
    "NaN": OK + line({"error": {"type": "FastVLMError", "message": "the logits are NaN"}}),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_server_leaves_unanswered_is_answered_here(name: str, pretend: Callable[..., Result]) -> None:
    result = pretend(lambda connection, _: connection.sendall(UNSEEN[name]))
    assert (result.exit_code, result.stdout, result.stderr) == (0, ANSWER.decode(), "")


def test_an_answer_that_breaks_off_is_an_error_once_it_was_shown(pretend: Callable[..., Result]) -> None:
    result = pretend(lambda connection, _: connection.sendall(OK + piece("A gre") + b'{"pie'))
    assert (result.exit_code, result.stdout) == (1, "A gre")
    assert result.stderr == "error: the background server has gone; run the command again\n"


def test_an_answer_that_breaks_off_is_given_here_as_long_as_nothing_was_shown(
    pretend: Callable[..., Result],
) -> None:
    result = pretend(lambda connection, _: connection.sendall(OK + piece("A gre")), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["text"] == ANSWER.decode().strip()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_says_nothing_costs_half_a_second(tmp_path: Path) -> None:
    place = Place(tmp_path / "warm")
    place.make()
    with place.listen():
        start = time.monotonic()
        assert find_warm(Holding(model="demo"), place) is None
        assert time.monotonic() - start < 50.0


def test_no_server_costs_nothing(tmp_path: Path) -> None:
    start = time.process_time()
    for _ in range(20):
        assert find_warm(Holding(model="demo"), Place(tmp_path / "warm")) is None
    assert time.process_time() - start < 1.0


def test_hello_holds_what_could_change_an_answer() -> None:
    record: dict[str, Any] = Holding(model="demo", dtype="float16").record()
    assert set(record) == {
        "model",
        "on_disk",
        "revision",
        "dtype",
        "protocol",
        "version",
        "package",
        "environment",
    }
