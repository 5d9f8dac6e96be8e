"""`fastvlm watch`: films, live pictures with keys at a pseudo-terminal, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from fastvlm_mlx import backend
from fastvlm_mlx.cli import app
from tests import films
from tests.terminals import Terminal
from tests.warm.background import COMMAND, DEMO, environment

FIRST = "A green triangle, a black cross and a green cross."
SECOND = "A blue circle, a blue star and a yellow circle."


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def on_black(name: str) -> NDArray[np.uint8]:
    canvas = Image.new("RGB", (384, 384))
    with Image.open(DEMO / name) as image:
        canvas.paste(image.convert("RGB"), ((384 - image.width) // 2, (384 - image.height) // 2))
    return np.asarray(canvas)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of one picture, then two of another."""
    pictures = [on_black(name) for name in ("sample-1.png", "sample-2.png")]
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return films.write(path, [number / 10 for number in range(40)], draw=lambda number: pictures[number // 20])


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(cache))
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))


def watch(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["watch", "-m", "demo", *map(str, arguments)])


def test_a_film_is_told_scene_by_scene_with_its_times(film: Path) -> None:
    result = watch(film)
    assert (result.exit_code, result.stdout) == (0, f"0:00  {FIRST}\n0:02  {SECOND}\n")
    assert "\x1b" not in result.output


def test_a_film_gives_subtitles(film: Path) -> None:
    assert watch(film, "--format", "srt").stdout == (
        f"1\n00:00:00,000 --> 00:00:02,000\n{FIRST}\n\n2\n00:00:02,000 --> 00:00:04,000\n{SECOND}\n\n"
    )
    assert watch(film, "--format", "vtt").stdout.startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:02.000\n")


def test_records_of_a_film_are_the_lines_of_the_log_and_a_command_gets_each_text(film: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "out"
    result = watch(film, "--format", "jsonl", "--log", log, "--on-change", f"sh -c 'cat >> {out}; echo >> {out}'")
    assert log.read_text() == result.stdout
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["time"], first["end"], first["text"], first["task"]) == (0.0, 2.0, FIRST, "describe")
    assert second["text"] == SECOND
    assert out.read_text() == f"{FIRST}\n{SECOND}\n"


def test_other_questions_are_asked(film: Path) -> None:
    assert watch(film, "--prompt", "How many shapes are there?").stdout == "0:00  3\n"  # as in the second scene
    assert watch(film, "--prompt", "Is there a black cross?").stdout == "0:00  yes\n0:02  no\n"
    assert (
        watch(film, "--find", "a green triangle").stdout == "0:00  a green triangle: yes\n0:02  a green triangle: no\n"
    )
    assert watch(film, "--task", "read").stdout.count("\n") == 2


def test_a_film_of_nothing_but_black_is_told_in_no_words(tmp_path: Path) -> None:
    path = films.write(tmp_path / "black.mp4", [0, 0.1, 0.2], draw=lambda _: np.zeros((48, 64, 3), np.uint8))
    result = watch(path)
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "find"], "say what to find with --find, such as --find 'a red cup'"),
        (["--find", "keys", "--task", "read"], "would change nothing with --find"),
        (["--find", "keys", "--prompt", "What?"], "would change nothing with --prompt"),
        (["--prompt", " "], "the question is empty"),
        (["--speak", "espeak-ng"], "would change nothing for a film by its own time; add --live"),
        (["--rate", "150"], "would change nothing for a film by its own time; add --live"),
        (["--every", "-1"], "must be at least 0"),
        (["--max-fps", "0"], "must be at least 0.1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(film: Path, arguments: list[str], message: str) -> None:
    result = watch(film, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "missing.mp4: no such file"),
        (["@nothing"], "@nothing: no such source"),
        (["@test", "--on-change", "no-such-program"], "no-such-program: there is no such program to run at a change"),
        (["@test", "--log", "missing/log"], "missing/log: cannot be written"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("fastvlm_mlx.resolve.load", None)
    result = watch(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_log_is_never_written_into_a_film(film: Path) -> None:
    content = film.read_bytes()
    result = watch(film, "--log", film)
    assert (result.exit_code, film.read_bytes()) == (1, content)
    assert "is not a log of fastvlm watch, and nothing was written" in result.stderr


def test_sources_are_listed() -> None:
    result = watch("--list-sources")
    assert result.exit_code == 0
    assert "@test  a test pattern that moves\n" in result.stdout


class Watching(Terminal):
    """A `fastvlm watch` at a pseudo-terminal that is still as it was when it was made."""

    def __init__(self, *arguments: object, columns: int = 80, **variables: str) -> None:
        super().__init__("watch", "-m", "demo", *map(str, arguments), columns=columns, **variables)

    def has_echo(self) -> bool:
        return bool(termios.tcgetattr(self._descriptor)[3] & termios.ECHO)


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute of one picture."""
    pixels = on_black("sample-1.png")
    path = tmp_path_factory.mktemp("long") / "film.mp4"
    return films.write(path, [number / 2 for number in range(120)], draw=lambda _: pixels)


def test_keys_describe_repeat_pause_and_ask_and_the_terminal_is_as_before(long_film: Path) -> None:
    terminal = Watching(long_film, "--live", "--speak", "none", "--heartbeat", "0")
    terminal.wait_for("keys: space describes now")
    terminal.wait_for(FIRST)
    assert not terminal.has_echo()
    terminal.write("p")
    terminal.wait_for("paused")
    terminal.write(" ")
    terminal.wait_for("A ")
    terminal.write("r")
    terminal.wait_for("A ")
    terminal.write("?")
    terminal.wait_for("your question: ")
    assert terminal.has_echo()
    terminal.write("How many shapes are there?\n")
    terminal.wait_for("there?\r\n")
    terminal.wait_for("\r\n")
    terminal.write("q")
    assert terminal.end() == 0


def test_an_interrupt_leaves_a_narrow_terminal_as_it_was(film: Path) -> None:
    terminal = Watching("@test", "--speak", "none", columns=20)
    terminal.wait_for("watching")
    terminal.wait_for("A ")
    assert not terminal.has_echo()
    terminal.write("\x03")
    deadline = time.monotonic() + 60
    while not terminal.has_echo():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert terminal.end() == 130
    lines = terminal.output.split("A ", 1)[1].replace("^C", "").splitlines()
    assert max(map(len, lines)) <= 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_without_a_terminal_a_signal_leaves_a_whole_log(number: signal.Signals, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [*COMMAND, "watch", "-m", "demo", "@test", "--log", str(log), "--format", "jsonl"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(cache)
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], stderr
    content = log.read_text()
    assert content.endswith("\n")
    assert content.startswith(line.decode())
    assert all(json.loads(each)["text"] for each in content.splitlines())
    assert b"Traceback" not in stderr


def test_what_is_told_live_is_spoken(film: Path, tmp_path: Path) -> None:
    spoken = tmp_path / "spoken"
    program = tmp_path / "espeak-ng"
    program.write_text(f"#!{sys.executable}\nimport sys\nopen({str(spoken)!r}, 'a').write(sys.stdin.read() + '\\n')\n")
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = CliRunner(env={"PATH": path}).invoke(
        app, ["watch", "-m", "demo", str(film), "--live", "--speak", "espeak-ng"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == SECOND
    first, *_, last = spoken.read_text().splitlines()
    assert (first, last) == ("watching", SECOND)


def test_a_program_that_is_missing_does_not_keep_anybody_from_watching(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = watch(film, "--live", "--speak", "say")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, SECOND)
    assert "nothing is spoken: say was not found on $PATH; descriptions are shown" in result.stderr
