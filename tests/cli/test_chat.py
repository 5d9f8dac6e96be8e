"""`fastvlm chat`, with programs and at a pseudo-terminal."""

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx import backend
from fastvlm_mlx.chat.commands import COMMANDS, complete, help_lines
from fastvlm_mlx.cli import app
from tests import terminals
from tests.checkpoints import APPLE, changed
from tests.conftest import Converted
from tests.warm.background import DEMO, background

ANSWER = "A green triangle, a black cross and a green cross."


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(cache))
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))
    shutil.copy(DEMO / "sample-1.png", tmp_path / "my photo.png")
    shutil.copy(DEMO / "sample-2.png", tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat(lines: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["chat", "-m", "demo", *options], input=lines)


def records(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_each_line_is_a_question_and_each_answer_a_line(folder: Path) -> None:
    result = chat("'my photo.png' What is in the picture?\n\nIs there a cross?\n")
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\nno\n")
    assert "picture: my photo.png, 384×323, 133 kB\n" in result.stderr
    assert "\x1b" not in result.output


def test_what_was_seen_is_known_to_the_next_question(folder: Path) -> None:
    first, second = records(chat("What is it?\nIs there a cross?\n", "my photo.png", "--json"))
    assert first["images"] == ["my photo.png"]
    assert second["images"] == []
    assert first["reused_tokens"] == 0
    assert first["visual_tokens"] == second["visual_tokens"] == 9
    assert int(str(second["reused_tokens"])) >= int(str(first["prompt_tokens"])) - 4
    verbose = chat("What is it?\nIs there a cross?\n", "my photo.png", "-v").stderr
    assert "0 of 34 prompt tokens were known" in verbose
    assert f"{second['reused_tokens']} of {second['prompt_tokens']} prompt tokens were known" in verbose


def test_a_line_that_fails_is_a_line_too_and_the_rest_goes_on(folder: Path) -> None:
    result = chat("missing/a.png What is it?\nb.png What is it?\n")
    assert result.exit_code == 0  # the first names no file, and is a question
    result = chat("./missing.png What is it?\n'my photo.png' What is it?\n")
    assert (result.exit_code, result.stdout.count("\n")) == (3, 2)
    assert "error: " in result.stderr
    bad, good = records(chat("./missing.png What?\n'my photo.png' What is in the picture?\n", "--json"))
    assert bad == {"error": {"type": "ImageError", "message": f"{folder / 'missing.png'}: no such file"}}
    assert good["text"] == ANSWER


def test_bytes_that_are_no_text_are_an_error_of_their_line(folder: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "-m", "demo"], input=b"caf\xe9\nHello\n")
    assert result.exit_code == 3
    assert "error: stdin: byte 0xe9 is not UTF-8" in result.stderr
    assert result.stdout.count("\n") == 2


def test_a_question_may_have_several_lines(folder: Path) -> None:
    joined = records(chat('Is there\\\na cross?\n"""Is there\na cross?"""\n', "my photo.png", "--json"))
    assert joined[0]["prompt_tokens"] is not None
    assert len(joined) == 2


def test_an_unknown_command_is_told_the_nearest(folder: Path) -> None:
    result = chat(
        "/rest\n/xyzzy\n/undo now\n/set colour=red\n/set temperature\n/image\n/load missing.json\n/undo\n/retry\n"
    )
    assert result.stdout == ""
    for message in (
        "there is no command /rest; did you mean /reset?",
        "there is no command /xyzzy; /help lists what there is",
        "/undo takes nothing, not now",
        "there is no setting colour",
        "/set takes NAME=VALUE",
        "/image needs a path or a URL",
        "missing.json: no such file",
        "there is nothing to take back",
        "there is no question to ask again",
    ):
        assert f"error: {message}" in result.stderr, message
    assert result.exit_code == 3


def test_undo_retry_and_reset_change_what_is_known(folder: Path) -> None:
    lines = "What is it?\nIs there a cross?\n/undo\n/retry\n/tokens\n/reset\n/images\n/tokens\nHello\n"
    result = chat(lines, "my photo.png", "--json")
    first, _, again, after = records(result)
    assert again["text"] == first["text"]
    assert again["images"] == ["my photo.png"]
    assert after["visual_tokens"] == 0
    assert "took back: Is there a cross?" in result.stderr
    assert "tokens are taken: 9 by 1 picture" in result.stderr
    assert "no pictures yet" in result.stderr
    assert "the context is empty" in result.stderr


def test_settings_and_system_reach_the_answer(folder: Path) -> None:
    lines = '/set max_tokens=2|What is in the picture?|/set|/system Be brief.|/system ""|/set max_tokens=default|'
    result = chat(lines.replace("|", "\n"), "b.png", "--json")
    (cut,) = records(result)
    assert (cut["finish_reason"], cut["generated_tokens"]) == ("length", 2)
    for note in ("max_tokens=2\n", "system: Be brief.\n", "system: the default\n"):
        assert note in result.stderr


def test_a_conversation_is_saved_and_loaded(folder: Path) -> None:
    saved = chat("What is it?\n/save 'my talk.json'\n", "my photo.png", "--json")
    assert "saved 1 question in my talk.json" in saved.stderr
    loaded = records(chat("/load my talk.json\nIs there a cross?\n", "--json"))
    assert loaded[0]["visual_tokens"] == 9
    assert int(str(loaded[0]["prompt_tokens"])) > int(str(records(saved)[0]["prompt_tokens"]))
    (folder / "precious.txt").write_text("mine")
    refused = chat("/save precious.txt\n")
    assert "precious.txt: is there already, and no conversation" in refused.stderr
    assert (folder / "precious.txt").read_text() == "mine"


def test_the_oldest_turn_is_forgotten_when_the_context_is_full_and_its_picture_is_not(folder: Path) -> None:
    long = "word " * 380
    lines = f"What is it?\n{long}\n{long}\n{long}\n{long}\nIs there a cross?\n"
    result = chat(lines, "my photo.png", "--json", "-n", "40")
    answers = records(result)
    assert all(answer["visual_tokens"] == 9 for answer in answers)
    assert sum(int(str(answer["forgotten"])) for answer in answers) >= 1
    assert "the context is full: forgot the oldest question (What is it?); 1 picture of it kept" in result.stderr
    assert result.exit_code == 0


def test_a_question_that_does_not_fit_at_all_is_refused_and_harms_nothing(folder: Path) -> None:
    refused, answered = records(chat(f"{'word ' * 3000}\nIs there a cross?\n", "my photo.png", "--json"))
    assert "of 2048 positions; shorten it" in str(refused)
    assert answered["images"] == ["my photo.png"]


def test_the_last_conversation_goes_on(folder: Path, cache: Path) -> None:
    chat("What is it?\n", "my photo.png")
    assert not (cache / "chat" / "last.json").exists()  # of programs nothing is kept
    output = at_terminal("-m", "demo", keys=["'my photo.png' What is in the picture?\n", "\x04"])
    assert ANSWER in output
    file = cache / "chat" / "last.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (again,) = records(chat("Is there a cross?\n", "-c", "--json"))
    assert again["visual_tokens"] == 9
    assert len(json.loads(file.read_text())["messages"]) == 4
    kept = file.read_bytes()
    at_terminal("-m", "demo", "--private", keys=["Secret?\n", "\x04"])
    assert file.read_bytes() == kept
    assert "Secret" not in (cache / "chat" / "history").read_text()


class Terminal(terminals.Terminal):
    """A `fastvlm chat` at a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, **variables: str) -> None:
        super().__init__("chat", *arguments, columns=columns, **variables)


def at_terminal(*arguments: str, keys: list[str], columns: int = 80, **variables: str) -> str:
    """What a conversation shows in which each line is typed when the prompt is there."""
    terminal = Terminal(*arguments, columns=columns, **variables)
    for each in keys:
        terminal.wait_for("> ")
        terminal.write(each)
    assert terminal.end() == 0, terminal.output
    return terminal.output


def test_at_a_terminal_answers_stream_and_the_prompt_shows_how_full_the_context_is(folder: Path) -> None:
    output = at_terminal("-m", "demo", keys=["my\\ photo.png What is in the picture?\n", "/tokens\n", "/quit\n"])
    assert ANSWER in output
    assert "% > " in output
    assert "\x1b[2mpicture: my photo.png" in output


def test_no_color_means_no_colour(folder: Path) -> None:
    output = at_terminal("-m", "demo", keys=["b.png\n", "\x04"], NO_COLOR="1")
    assert "picture: b.png" in output
    assert "\x1b[2m" not in output


def test_twenty_columns_are_enough(folder: Path) -> None:
    output = at_terminal("-m", "demo", keys=["/help\n", "\x04"], columns=20)
    assert "/undo\r\n  take back the last question and its answer" in output


def test_tab_completes_commands_and_paths(folder: Path) -> None:
    output = at_terminal("-m", "demo", keys=["/ima\t\t", "\x15/image my\t\n", "/im\tages\n", "\x04"][1:])
    assert "picture: my photo.png" in output


def test_two_interrupts_at_the_prompt_leave(folder: Path) -> None:
    terminal = Terminal("-m", "demo")
    terminal.wait_for("> ")
    terminal.write("half a line\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    terminal.write("/tokens\n")
    terminal.wait_for("the context is empty")
    terminal.wait_for("> ")
    terminal.write("\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    terminal.write("\x03")
    assert terminal.end() == 130


@pytest.mark.parametrize("is_warm", [False, True])
def test_an_interrupt_stops_the_answer_only(folder: Path, tmp_path: Path, converted: Converted, is_warm: bool) -> None:
    model = str(changed(converted("apple"), tmp_path / "model", config={"eos_token_id": [5]}))  # which it never says
    os.environ["FASTVLM_CACHE"] = str(tmp_path / "cache")
    with background(tmp_path / "cache", model) if is_warm else _nothing():
        terminal = Terminal(str(APPLE / "images" / "square.png"), "-m", model, "-n", "1900", "-v")
        terminal.wait_for("> ")
        assert ("keeps the model warm" in terminal.output) == is_warm
        terminal.write("What is it?\n")
        terminal.wait_for("What is it?\r\n")
        terminal.write("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.write("/set max_tokens=3\n")
        terminal.wait_for("max_tokens=3\r\n")
        terminal.wait_for("> ")
        terminal.write("And now?\n")
        terminal.wait_for("cut after 3 tokens")
        terminal.wait_for("> ")
        terminal.write("\x04")
        assert terminal.end() == 0


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def lines(folder: Path) -> Callable[[str], list[str]]:
    return complete


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/un", ["/undo"]),
        ("/im", ["/image ", "/images"]),
        ("/set temp", ["temperature="]),
        ("/image my", ["my\\ photo.png "]),
        ("/image my\\ ph", ["my\\ photo.png "]),
        ("What is ./b", ["./b.png "]),
        ("What is b", []),
        ("/image /nowhere/", []),
        ("", []),
    ],
)
def test_a_word_is_completed(lines: Callable[[str], list[str]], line: str, expected: list[str]) -> None:
    assert lines(line) == expected


def test_help_names_every_command_at_any_width() -> None:
    for columns in (10, 20, 79, 200):
        text = "\n".join(help_lines(columns))
        assert all(name in text for name in COMMANDS)


def test_a_conversation_with_and_without_the_server_is_the_same(folder: Path, tmp_path: Path) -> None:
    lines = (
        "What is it?\nIs there a cross?\n/undo\n/retry\n/set temperature=1 seed=3\nWhat colours are there?\n/tokens\n"
    )
    os.environ["FASTVLM_CACHE"] = str(tmp_path / "own")
    with background(tmp_path / "own", "demo"):
        warm = chat(lines, "my photo.png")
        cold = chat(lines, "my photo.png", "--no-warm")
        assert (warm.exit_code, warm.stdout) == (cold.exit_code, cold.stdout)
        assert warm.stderr == cold.stderr
        reused = [answer["reused_tokens"] for answer in records(chat(lines, "my photo.png", "--json"))]
    assert all(int(str(count)) > 0 for count in reused[1:])


def test_a_server_that_goes_away_between_two_questions_is_not_missed(folder: Path, tmp_path: Path) -> None:
    os.environ["FASTVLM_CACHE"] = str(tmp_path / "own")
    with background(tmp_path / "own", "demo") as holder:
        terminal = Terminal("my photo.png", "-m", "demo")
        terminal.wait_for("> ")
        terminal.write("What is in the picture?\n")
        terminal.wait_for(ANSWER)
        terminal.wait_for("% > ")
        os.kill(holder, signal.SIGKILL)
        terminal.write("Is there a cross?\n")
        terminal.wait_for("no\r\n")
        terminal.wait_for("> ")
        terminal.write("\x04")
        assert terminal.end() == 0
