"""The command line with streams that are closed, full or in another encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx.cli import terminal
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.machine import cache_folder
from tests.checkpoints import APPLE

COMMAND = [sys.executable, "-m", "fastvlm_mlx"]
PICTURE = str(APPLE / "images" / "square.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from fastvlm_mlx.convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("streams") / "model"
    convert_checkpoint(APPLE / "reparam", folder, dtype="float32")
    return str(folder)


def shell(arguments: list[str], redirection: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """`fastvlm …` as a shell runs it with a redirection, such as `<&-`."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *COMMAND, *arguments],
        capture_output=True,
        env={**os.environ, **variables},
        check=False,
        timeout=180,
    )


def test_closed_streams_change_nothing(model: str, tmp_path: Path) -> None:
    answered = shell(["generate", PICTURE, "-m", model, "-n", "2"], "<&- 2>&-")
    assert (answered.returncode, answered.stderr) == (0, b"")
    assert answered.stdout.strip()
    silent = shell(["convert", str(APPLE / "reparam"), str(tmp_path / "out")], "<&- >&- 2>&-")
    assert silent.returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_python_too_loads_a_model_with_stdin_closed(model: str) -> None:
    code = "import os, sys; os.close(0); from fastvlm_mlx import load; load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, model], check=True)


def test_an_image_from_a_closed_stdin_is_an_error(model: str) -> None:
    done = shell(["generate", "-", "-m", model], "<&-")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: stdin was empty; pipe an image or a prompt into it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["generate", PICTURE, "-m", "MODEL"]], ids=" ".join
)
def test_a_full_stdout_is_one_line_on_stderr(arguments: list[str], model: str) -> None:
    done = shell([model if word == "MODEL" else word for word in arguments], "> /dev/full")
    assert done.returncode == 1
    assert done.stderr in (b"error: No space left on device\n", b"error: No space left on device: stdout\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_stderr_does_not_fail_what_is_complete(model: str) -> None:
    done = shell(["generate", PICTURE, "-m", model, "-n", "2", "-v"], "2> /dev/full")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_json_stays_json_in_an_old_encoding(model: str) -> None:
    arguments = ["generate", "-p", "Füße, 猫", "-m", model, "-n", "2", "--json"]
    done = shell(arguments, "", PYTHONIOENCODING="latin-1")
    assert json.loads(done.stdout.decode("ascii"))["prompt"] == "Füße, 猫"
    assert json.loads(shell(arguments, "", LC_ALL="C").stdout)["prompt"] == "Füße, 猫"


def test_a_relative_cache_folder_of_the_desktop_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The XDG specification says so."""
    monkeypatch.delenv("FASTVLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "cache", "./cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path("/home/someone/.cache/fastvlm-mlx")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/fastvlm-mlx")
    monkeypatch.setenv("FASTVLM_CACHE", "models")
    assert cache_folder() == Path("models")


@pytest.mark.parametrize("home", ["", "home"])
def test_without_a_home_folder_the_message_names_the_variable(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTVLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(CheckpointError, match="there is no home folder; set FASTVLM_CACHE to a folder for models"):
        cache_folder()


def test_a_note_is_one_line_that_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.note("converting \x1b]0;title\x07evil\r\nname " + "x" * 10_000)
    shown = capsys.readouterr().err
    assert shown.startswith(r"converting \x1b]0;title\x07evil\r\nname xxx")
    assert len(shown) == 501
    assert shown.isprintable() is False  # for its only line break
    assert shown[:-1].isprintable()


def test_a_result_keeps_its_lines_and_escapes_what_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show("part  size\n\x1b[2Jvision  \u202e")
    assert capsys.readouterr().out == "part  size\n\\x1b[2Jvision  \\u202e\n"


def test_an_answer_is_escaped_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "A\ttab,\na bell\x07 and \x1b[2J, 5\u00a0km"
    terminal.show_answer(answer)
    assert capsys.readouterr().out == answer
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.show_answer(answer)
    assert capsys.readouterr().out == "A\ttab,\na bell\\x07 and \\x1b[2J, 5\u00a0km"


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> pytest.CaptureFixture[str]:
    """Captures what a terminal on stderr would get."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "_PATIENCE", 0.01)
    return capsys


def test_a_wait_shows_life_and_leaves_nothing(
    screen: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal.LiveLine() as line:
        line.wait_for("loading\nthe model")
        monkeypatch.setattr(line, "_since", line._since - 7)
        line._draw()
        terminal.note("a note")
        line._draw()
    shown = screen.readouterr().err
    assert r"loading\nthe model, 7 s" in shown
    assert "\r\x1b[Ka note\n" in shown  # the line goes before a note is written
    assert shown.endswith("\r\x1b[K")


def test_a_short_wait_shows_nothing(screen: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PATIENCE", 60)
    with terminal.LiveLine() as line:
        line.wait_for("loading")
    assert screen.readouterr().err == ""


def test_nothing_is_drawn_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.LiveLine() as line, terminal.ByteProgress() as progress:
        line.show("loading")
        progress(1, 2, "converting")
    assert capsys.readouterr().err == ""
