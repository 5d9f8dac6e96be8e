import os
from pathlib import Path

import pytest

from fastvlm_mlx.inputs.named import is_live, is_plain, kind_of, meant


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"\n\n%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypisom", "film"),
        (b"\0\0\0\x14ftypqt  ", "film"),
        (b"\0\0\0\x18ftypheic", ""),
        (b"\0\0\0\x18ftypavif", ""),
        (b"\0\0\0\x08wide", "film"),
        (b"\x1aE\xdf\xa3", "film"),
        (b"RIFF\0\0\0\0AVI LIST", "film"),
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02", "animation"),
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x10", ""),
        (b"RIFF\0\0\0\0WEBPVP8X", ""),
        (b"RIFF\0\0\0\0WAVE", ""),
        (b"GIF89a", "animation"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x08acTL", "animation"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff\xe0", ""),
        ((b"\x47" + bytes(187)) * 4, "film"),
        (b"", ""),
    ],
)
def test_a_file_is_known_by_how_it_begins(head: bytes, kind: str) -> None:
    assert kind_of(head) == kind


def test_devices_are_not_files_unless_a_file_has_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_live("@screen")
    assert is_live("@camera:1")
    assert is_live("lavfi:testsrc2")
    assert not is_live("@screenshot.png")
    (tmp_path / "@screen").touch()
    assert not is_live("@screen")


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("photo.jpg", True),
        ("missing.mp4", True),  # reading it says that it is missing
        ("https://x.org/a.jpg", True),
        ("https://x.org/a.mp4?b=c", False),
        ("https://x.org/a.pdf#2", False),
        ("https://x.org/a.gif", True),
        ("data:image/png;base64,AAAA", True),
        ("data:application/pdf;base64,AAAA", False),
        (b"%PDF-1.7", False),
        (b"GIF89a", True),
        ("@clipboard", False),
        (Path("photo.jpg"), True),
    ],
)
def test_only_what_holds_several_pictures_is_not_plain(source: object, plain: bool) -> None:
    assert is_plain(source) == plain


@pytest.mark.parametrize(
    ("name", "device"),
    [("@camrea", "@camera"), ("@Screen:2", "@screen:2"), ("@clipbord", "@clipboard"), ("@x", ""), ("camrea", "")],
)
def test_a_misspelt_device_is_recognised(name: str, device: str) -> None:
    assert meant(name) == device


def test_a_file_whose_name_is_like_a_device_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "@camrea").touch()
    assert meant("@camrea") == ""


def test_nothing_is_read_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_plain(str(tmp_path / "pipe"))
