import base64
import io
import os
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from fastvlm_mlx.chat.pictures import Picture, split_line, words
from fastvlm_mlx.errors import ImageError
from tests.warm.background import DEMO

SAMPLE = DEMO / "sample-1.png"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photos").mkdir()
    for name in ("a.png", "my photos/it's 1 (2).JPG", "ünïcode 猫.jpeg", "%41.png", "back\\slash.png"):
        shutil.copy(SAMPLE, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def escaped(path: str) -> str:
    return "".join(f"\\{char}" if not char.isalnum() and char not in "/._" else char for char in path)


def single(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"


WAYS = {
    "as a shell escapes it": escaped,
    "in single quotes": single,
    "in double quotes": lambda path: '"' + path + '"',
    "as a URL": lambda path: "file://" + quote(path),
    "as a URL of this host": lambda path: "file://localhost" + quote(path),
    "with plain blanks": lambda path: path,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a.png", "my photos/it's 1 (2).JPG", "ünïcode 猫.jpeg", "%41.png"])
def test_a_dropped_path_is_a_picture_however_it_is_written(folder: Path, name: str, way: str) -> None:
    path = str(folder / name)
    dropped = WAYS[way](path)
    assert split_line(f"{dropped} what's this?") == ("what's this?", [path])
    assert split_line(f"What is it? {dropped} ") == ("What is it?", [path])
    assert split_line(dropped) == ("", [path])
    assert split_line(f"{dropped} {dropped} What differs?") == ("What differs?", [path, path])


@pytest.mark.parametrize(
    ("line", "text", "names"),
    [
        ("what's on a.png now", "what's on now", ["a.png"]),
        ("./a.png", "", ["./a.png"]),
        ("~/a.png what?", "what?", ["~/a.png"]),
        ("~/missing.png what?", "what?", ["~/missing.png"]),
        ("/nowhere/b.jpg what?", "what?", ["/nowhere/b.jpg"]),
        ("b.png does not exist", "b.png does not exist", []),
        ("notes.txt is text", "notes.txt is text", []),
        ("what's in John's 'car?", "what's in John's 'car?", []),
        ("a.png? or a.pngs", "a.png? or a.pngs", []),
        ("see https://example.com/a.png", "see https://example.com/a.png", []),
        ("1/2 and /etc/passwd", "1/2 and /etc/passwd", []),
        ("file://elsewhere/a.png what?", "file://elsewhere/a.png what?", []),
        ("a\\ b", "a\\ b", []),
        ("two\n  lines", "two\n  lines", []),
        ("", "", []),
        ("'", "'", []),
        ("file:///%ff%00.png", "", ["/\udcff\0.png"]),
    ],
)
def test_a_line_keeps_what_is_no_picture(folder: Path, line: str, text: str, names: list[str]) -> None:
    assert split_line(line) == (text, names)


def test_a_long_line_takes_no_time(folder: Path) -> None:
    start = time.process_time()
    for line in ("/ " * 4000, "'a.png" * 1000, "\\ " * 3900 + ".png", "x.png" * 200_000, "a.png " * 1300):
        split_line(line)
    assert time.process_time() - start < 4.0


def test_a_picture_has_a_name_and_a_size(folder: Path) -> None:
    picture = Picture.of("~/a.png")
    assert picture.source == str(folder / "a.png")
    assert picture.encoded.data == SAMPLE.read_bytes()
    assert str(picture) == "a.png, 384×323, 133 kB"
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(pixel.getvalue()).decode()}"
    assert str(Picture.of(url)).startswith("pasted picture, 1×1, ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "missing.png: no such file"),
        ("notes.txt", "notes.txt: "),
        ("my photos", "is a folder"),
        ("file://elsewhere/a.png", "is on another machine, elsewhere"),
        ("\0", "cannot be opened"),
        ("", "the name is empty"),
    ],
)
def test_what_is_no_picture_is_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        Picture.of(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a b", ["a", "b"]),
        ("'a b' c\\ d", ["a b", "c d"]),
        ("it's", ["it's"]),
        ('stop="a b" x=1', ["stop=a b", "x=1"]),
        ("", []),
        (" \t", []),
        ("a\\", ["a\\"]),
    ],
)
def test_words_are_those_of_a_shell(line: str, expected: list[str]) -> None:
    assert words(line) == expected


def test_a_file_whose_name_begins_with_a_tilde_is_preferred_to_home(folder: Path) -> None:
    os.makedirs("~")
    shutil.copy(SAMPLE, "~/a.png")
    assert Picture.of("~/a.png").source == str(folder / "~" / "a.png")


def test_films_pdfs_and_their_parts_can_be_dropped_into_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("film.mp4", "paper.pdf"):
        (tmp_path / name).touch()
    assert split_line("What happens in film.mp4#t=2.5 and paper.pdf#1-3?") == (
        "What happens in and paper.pdf#1-3?",
        ["film.mp4#t=2.5"],
    )
    assert split_line("paper.pdf#1-3 other.pdf What is it?") == ("other.pdf What is it?", ["paper.pdf#1-3"])
