import math
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.fragments import Fragment, moment, page_ranges, split_name


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
