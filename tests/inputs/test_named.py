import math
import os
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.fragments import Fragment, moment, page_ranges, split_name
from fastvlm_mlx.inputs.named import is_live, is_plain, kind_of


@pytest.mark.parametrize(
    ("text", "pages", "start", "end"),
    [
        ("2", ((2, 2),), None, None),
        ("page=2", ((2, 2),), None, None),
        ("1-3,7", ((1, 3), (7, 7)), None, None),
        ("4-", ((4, None),), None, None),
        ("t=12.5", (), 12.5, None),
        ("t=10,20", (), 10, 20),
        ("t=,20", (), 0, 20),
        ("t=10,", (), 10, math.inf),
        ("t=npt:1:30,1:02:03.5", (), 90, 3723.5),
        ("t=3s", (), 3, None),
    ],
)
def test_a_fragment_names_pages_or_times(
    text: str, pages: tuple[tuple[int, int | None], ...], start: float | None, end: float | None
) -> None:
    assert Fragment.of(text) == (f"#{text}", pages, start, end)


@pytest.mark.parametrize(
    "text", ["", "0", "3-1", "x", "1-2-3", "t=", "t=,", "t=5,5", "t=5,2", "t=-1", "t=nan", "t=1e9", "t=١", "page="]
)
def test_what_is_neither_is_no_fragment(text: str) -> None:
    assert Fragment.of(text) is None


def test_a_moment_and_its_fragment_are_the_same() -> None:
    for seconds in (0, 0.5, 12.125, 3600, 86399.999):
        fragment = Fragment.of(moment(seconds)[1:])
        assert fragment is not None
        assert fragment.start == seconds


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("all", ((1, None),)), ("2", ((2, 2),)), ("1-3,5-", ((1, 3), (5, None))), ("t=1", ()), ("page=1", ()), ("0", ())],
)
def test_ranges_of_pages_are_read(text: str, ranges: tuple[tuple[int, int | None], ...]) -> None:
    assert page_ranges(text) == ranges


def test_a_file_whose_name_has_a_fragment_is_that_file(tmp_path: Path) -> None:
    for name in ("a.pdf", "a.pdf#2"):
        (tmp_path / name).touch()
    assert split_name(f"{tmp_path}/a.pdf#2") == (f"{tmp_path}/a.pdf#2", None)
    assert split_name(f"{tmp_path}/a.pdf#3") == (f"{tmp_path}/a.pdf", Fragment("#3", ((3, 3),)))
    assert split_name(f"{tmp_path}/b.pdf#3") == (f"{tmp_path}/b.pdf#3", None)
    assert split_name("https://x.org/a.pdf#3") == ("https://x.org/a.pdf", Fragment("#3", ((3, 3),)))
    assert split_name("https://x.org/a#top") == ("https://x.org/a#top", None)
    assert split_name("What colour is #3?") == ("What colour is #3?", None)


def test_a_fragment_that_names_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ImageError, match=r"a.pdf#iii: #iii is neither pages, such as #2 or #1-3, nor a time in"):
        split_name(f"{tmp_path}/a.pdf#iii")


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


def test_nothing_is_read_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_plain(str(tmp_path / "pipe"))
