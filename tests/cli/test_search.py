"""`fastvlm search` on the command line."""

import fcntl
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx import FastVLM
from fastvlm_mlx.album.album import Hit, Results
from fastvlm_mlx.album.asking import Inquiry
from fastvlm_mlx.album.database import index_path
from fastvlm_mlx.cli.app import app
from fastvlm_mlx.cli.searching import Show
from tests.checkpoints import APPLE

NAMES = ("landscape.png", "portrait.png", "square.png")


@pytest.fixture
def model(converted: Callable[..., Path]) -> str:
    return str(converted("apple"))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures in the current folder's `photos`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVLM_RESOLUTION", raising=False)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(APPLE / "images" / name, folder / name)
    return folder


@pytest.fixture
def search(model: str, photos: Path) -> Callable[..., Result]:
    """Runs `fastvlm search photos` without captions."""

    def run(*arguments: str, folder: str = "photos", captions: bool = False) -> Result:
        more = () if captions or "--no-update" in arguments else ("--no-captions",)
        result = CliRunner().invoke(app, ["search", folder, *arguments, "-m", model, *more])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


def test_a_pipe_gets_one_path_a_line_and_the_rest_goes_to_stderr(search) -> None:
    result = search("a cat", "--threshold", "0")
    assert result.exit_code == 0
    assert sorted(result.stdout.splitlines()) == [f"photos/{name}" for name in NAMES]
    plan, indexed, asked = result.stderr.splitlines()[-3:]
    assert plan == "3 pictures, 3 to look at"
    assert indexed.startswith("3 indexed in ")
    assert asked.startswith("3 found, 3 asked in ")


def test_a_second_search_shows_nothing_to_the_tower(search, monkeypatch) -> None:
    first = search("a cat", "--threshold", "0")

    def see(*_: Any) -> None:
        raise AssertionError("the tower was used")

    monkeypatch.setattr(FastVLM, "encode_image", see)
    second = search("a cat", "--threshold", "0")
    assert second.stdout == first.stdout
    assert len(second.stderr.splitlines()) == 1


def test_json_has_a_line_for_each_hit(search) -> None:
    result = search("a cat", "--threshold", "0", "--json", "--top", "2")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 2
    assert set(records[0]) == {"path", "score", "probability", "words", "caption", "date", "width", "height"}
    assert records[0]["score"] == records[0]["probability"] >= records[1]["score"]
    assert "2 of 3 shown (--top 3 shows all)" in result.stderr


def test_names_can_end_with_zero_bytes_and_hold_any_byte(search, photos) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    (photos / "square.png").rename(photos / name)
    result = search("a cat", "--threshold", "0", "-0")
    assert sorted(result.stdout_bytes.split(b"\0")) == [
        b"",
        *(b"photos/caf\xe9\n.png", b"photos/landscape.png", b"photos/portrait.png"),
    ]


def test_words_find_captions_and_names_without_loading_the_model(search, monkeypatch) -> None:
    search(captions=True)
    monkeypatch.setattr("fastvlm_mlx.resolve.load", None)
    assert search("Squares", "--words", captions=True).stdout == "photos/square.png\n"
    result = search("zebra", "--words", "--no-update")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "nothing found\n")


def test_what_the_index_was_made_with_is_kept(search) -> None:
    search("-r", "64", "--ask", "printed=What does the text say?")
    result = search("a cat", captions=True)
    assert len(result.stderr.splitlines()) == 1  # nothing to look at
    with_captions = search("-r", "64", captions=True)
    assert "to look at" not in with_captions.stderr


def test_other_settings_are_noticed(search) -> None:
    search("-r", "64")
    result = search("-r", "128")
    assert "the index was made with other weights or settings; 3 pictures will be seen again by" in result.stderr
    assert "at 128 px" in result.stderr


def test_without_updating_other_settings_leave_nothing_to_ask_about(search) -> None:
    search("-r", "64")
    result = search("square", "-r", "128", "--no-update")
    assert result.stdout == "photos/square.png\n"
    assert "the index has nothing to ask this model about" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the query is empty"),
        ((" ",), "the query is empty"),
        (("a" * 10_000,), "the query has 10000 characters"),
        (("a cat", "--question", "Is it?"), "a question must have {} once"),
        (("a cat", "--since", "yesterday"), "'yesterday' is no date; write it as 2026, 2026-11 or 2026-11-26"),
        (("a cat", "--threshold", "2"), "must be at most 1, not 2"),
        (("a cat", "--resolution", "auto"), "all pictures of an index have one resolution"),
        (("a cat", "--words", "--seconds", "3"), "would change nothing with --words"),
        (("a cat", "--json", "-0"), "would change nothing with --json"),
        (("--top", "3"), "would change nothing without QUERY"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_done(search, photos, arguments, message) -> None:
    result = search(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not index_path(photos).exists()


@pytest.mark.parametrize(
    ("folder", "message"), [("missing", "missing: no such folder"), ("photos/square.png", "is not a folder")]
)
def test_what_is_no_folder_is_refused(search, tmp_path, folder, message) -> None:
    result = search("a cat", folder=folder)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "cache" / "albums").exists()


def test_a_folder_without_pictures_is_an_error(search, photos) -> None:
    for name in NAMES:
        (photos / name).unlink()
    result = search("a cat")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there are no pictures" in result.stderr


def test_a_folder_that_vanished_is_searched_by_its_index(search, photos) -> None:
    first = search("a cat", "--threshold", "0")
    photos.rename("elsewhere")
    result = search("a cat", "--threshold", "0")
    assert (result.exit_code, result.stdout) == (0, first.stdout)
    assert "the index keeps what it knows of 3 pictures, and is searched" in result.stderr


def test_an_unreadable_picture_is_named_and_makes_the_exit_code_3(search, photos) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = search("a cat", "--threshold", "0")
    assert result.exit_code == 3
    assert len(result.stdout.splitlines()) == 3
    assert "broken.png" in result.stderr
    again = search("a cat", "--threshold", "0")
    assert again.exit_code == 0
    assert again.stdout == result.stdout


@pytest.mark.parametrize("size", [100, 3000, 9000])
def test_a_damaged_index_is_made_anew_and_that_is_said(search, photos, size) -> None:
    expected = search("a cat", "--threshold", "0").stdout
    path = index_path(photos)
    path.write_bytes(path.read_bytes()[:size])
    result = search("a cat", "--threshold", "0")
    assert result.exit_code == 0
    assert "the index was damaged, and is made anew" in result.stderr
    assert result.stdout == expected


def test_damage_in_the_middle_is_noticed_on_the_way(search, photos) -> None:
    expected = search("a cat", "--threshold", "0").stdout
    path = index_path(photos)
    data = bytearray(path.read_bytes())
    data[4096 * 3 :] = bytes(len(data) - 4096 * 3)
    path.write_bytes(data)
    result = search("a cat", "--threshold", "0")
    assert result.exit_code == 0, result.stderr
    assert "the index was damaged, and is made anew" in result.stderr
    assert result.stdout == expected


def test_the_index_can_be_a_file_of_the_users_own(search, tmp_path, photos) -> None:
    result = search("a cat", "--threshold", "0", "--index", "mine.sqlite")
    assert len(result.stdout.splitlines()) == 3
    assert (tmp_path / "mine.sqlite").exists()
    assert not index_path(photos).exists()
    refused = search("a cat", "--index", "photos/square.png")
    assert refused.exit_code == 1
    assert "photos/square.png: is not the index of an album; name another file" in refused.stderr


def test_another_run_that_updates_the_index_is_not_waited_for(search, photos) -> None:
    search("a cat")
    path = index_path(photos)
    with path.with_name(f".{path.name}.updating").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = search("a cat", "--threshold", "0")
    assert "another run is bringing the index up to date; this one searches what it holds" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_an_interrupt_shows_what_is_known_and_exits_with_130(search, monkeypatch) -> None:
    search()
    ask = Inquiry.__call__

    def once(this, tokens):
        monkeypatch.setattr(Inquiry, "__call__", interrupt)
        return ask(this, tokens)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Inquiry, "__call__", once)
    monkeypatch.setattr("fastvlm_mlx.album.album._FIRST_BATCH", 1)
    monkeypatch.setattr("fastvlm_mlx.album.album._EVERY", 0)
    result = search("a cat", "--threshold", "0")
    assert result.exit_code == 130
    assert len(result.stdout.splitlines()) == 1
    assert "1 found, 1 of 3 asked in " in result.stderr


def test_the_best_are_opened(search, tmp_path, monkeypatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("open", "xdg-open"):
        (programs / name).write_text('#!/bin/sh\necho "$1" >> "$OPENED"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    result = search("a cat", "--threshold", "0", "--open")
    (best, *_) = result.stdout.splitlines()
    assert (tmp_path / "opened").read_text() == f"{tmp_path / best}\n"


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stdout = Terminal()
    for name, value in {"COLUMNS": "40", "LINES": "4", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stdout)
    return stdout


def results(*captions: str) -> Results:
    hits = [
        Hit(
            **{"id": number, "path": "", "name": f"{number}.jpg", "score": 0.9, "probability": 0.9, "words": 0.0},
            **{"caption": caption, "date": "2026-11-26", "size": None},
        )
        for number, caption in enumerate(captions)
    ]
    return Results(hits=tuple(hits), found=len(hits), asked=0, total=0, seconds=0.0, done=True)


def test_a_terminal_shows_scores_and_captions_in_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    Show(Path("a"), as_json=False, end=b"\n").final(results("a long caption " * 9, "红色的圆形" * 9, "\x1b[2J", ""))
    first, second, third, last = terminal.getvalue().splitlines()
    assert first == "0.90  a/0.jpg  a long caption a long ca"
    assert second == "0.90  a/1.jpg  红色的圆形红色的圆形红色"
    assert third == "0.90  a/2.jpg  \\x1b[2J"
    assert last == "0.90  a/3.jpg"


def test_a_terminal_shows_a_better_order_in_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    show = Show(Path("a"), as_json=False, end=b"\n")
    show.improve(results("x", "y", "z"))
    show.improve(results("z"))
    show.final(results("z"))
    parts = terminal.getvalue().split("\x1b[J")
    assert [part.count("jpg") for part in parts] == [0, 2, 1, 1]  # of four lines, two are left for hits
    assert parts[1].endswith("\r\x1b[2A")
    assert parts[2].endswith("\r\x1b[1A")
