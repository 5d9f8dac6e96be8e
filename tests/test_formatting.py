"""What people read: byte counts, lists of names and tables."""

import pytest

from fastvlm_mlx.formatting import as_blocks, as_markdown, as_text, names, per_second, printable, readable_bytes

TABLE = [("part", "bits", "size"), ("decoder", "4.5", "12 MB"), ("vision", "16", "")]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (3_200_000_000, "3.20 GB"),
        (99_960, "100 kB"),
        (245_400_000, "245 MB"),
        (1_517_792_560, "1.52 GB"),
        (2e12, "2000 GB"),
    ],
)
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("items", "text"),
    [([], "nothing"), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_a_long_list_of_names_is_cut(items: list[str], text: str) -> None:
    assert names(items, most=3) == text


def test_numbers_of_a_table_are_on_the_right_and_lines_have_no_trailing_space() -> None:
    assert as_text(TABLE).splitlines() == ["part     bits   size", "decoder   4.5  12 MB", "vision     16"]


def test_as_many_columns_as_asked_for_are_on_the_left() -> None:
    assert as_text(TABLE, left=3).splitlines() == ["part     bits  size", "decoder  4.5   12 MB", "vision   16"]
    assert as_markdown(TABLE, left=2).splitlines()[1] == "| --- | --- | ---: |"


def test_a_table_in_markdown_has_a_rule_under_its_header() -> None:
    assert as_markdown(TABLE).splitlines() == [
        "| part | bits | size |",
        "| --- | ---: | ---: |",
        "| decoder | 4.5 | 12 MB |",
        "| vision | 16 |  |",
    ]


def test_a_name_in_a_message_is_short_and_printable() -> None:
    assert printable("photo.jpg") == "photo.jpg"
    assert printable("a\x1b[31m\n\ud83d") == r"a\x1b[31m\n\ud83d"
    assert printable("x" * 200) == "x" * 200
    for middle in ("x" * 1000, "\x1b" * 60, "x" * 190 + "é" * 10):
        shown = printable(f"start{middle}end")
        assert len(shown) == 200
        assert shown.startswith("start")
        assert shown.endswith("end")


def test_a_table_that_is_too_wide_goes_on_below_with_its_first_columns() -> None:
    rows = [["name", "first", "second", "third"], ["a", "1", "22", "333"]]
    assert as_blocks(rows, width=23) == "name  first  second\na         1      22\n\nname  third\na       333"
    assert as_blocks(rows, width=26) == as_text(rows)
    assert as_blocks(rows, width=1).count("name") == 3


@pytest.mark.parametrize(
    ("rate", "text"), [(0.534, "0.53"), (8.24, "8.2"), (99.4, "99"), (99.6, "100"), (1503, "1,503")]
)
def test_a_rate_has_no_exponent(rate: float, text: str) -> None:
    assert per_second(rate) == text
