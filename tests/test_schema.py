"""JSON from a checkpoint is decoded within bounds, and its values have the kinds and ranges that they must have."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx import schema
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.schema import array, boolean, integer, mapping, number, parse_object, read_object, read_small_file

REFUSED: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"a": 1', r"cannot be read as JSON \(Expecting"),
    "not UTF-8": (b'{"a": "\xff"}', r"cannot be read as JSON \('utf-8' codec"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r"cannot be read as JSON \('utf-8' codec"),
    "half a character": (b'{"a": "\\ud800"}', r"surrogates not allowed"),
    "half a character as a key": (b'{"\\udfff": 1}', r"surrogates not allowed"),
    "infinity": (b'{"a": Infinity}', "Infinity is no number"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "an exponent too large": (b'{"a": 1e999}', "1e999 is no number"),
    "thousands of digits": (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    "33 levels": (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "more than 32 levels deep"),
    "100,000 levels": (b'{"a": ' + b"[" * 100_000, "more than 32 levels deep"),
    "a list": (b"[1]", "must hold a JSON object, not a list"),
    "null": (b"null", "must hold a JSON object, not a NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_json_object_is_refused(case: str, tmp_path: Path) -> None:
    data, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=rf"^the label: .*{message}"):
        parse_object(data, "the label")
    path = tmp_path / "it.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"it\.json: .*{message}"):
        read_object(path)


def test_what_is_a_json_object_is_read() -> None:
    text = '{"a": [1, 2.5, null, true, "\\ud83d\\ude00 \\\\ud800"], "a": {"b": 10000000000000000000000}, "c": %s}'
    deep: Any = parse_object((text % ("[" * 31 + "]" * 31)).encode(), "it")
    assert deep["a"] == {"b": 10**22}
    assert parse_object(b'{"a": "\\ud83d\\ude00 \\\\ud800"}', "it") == {"a": "\N{GRINNING FACE} \\ud800"}


def test_a_key_that_appears_twice_is_refused_where_it_matters() -> None:
    with pytest.raises(CheckpointError, match="a key appears twice"):
        parse_object(b'{"a": {"b": 1, "b": 2}}', "it", unique=True)


def test_a_text_that_is_too_long_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "LARGEST_JSON", 1000)
    path = tmp_path / "it.json"
    path.write_bytes(b"{}".ljust(1001))
    message = r"has 1\.00 kB, expected at most 1\.00 kB; fetch it again"
    with pytest.raises(CheckpointError, match=rf"it\.json: {message}"):
        read_object(path)
    with pytest.raises(CheckpointError, match=rf"a header: {message}"):
        parse_object(path.read_bytes(), "a header")


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "cannot be read: Is a directory"),
    "a pipe": (os.mkfifo, "is not an ordinary file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is not an ordinary file"),
    "a loop": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_ordinary_file_is_refused_and_never_waited_for(case: str, tmp_path: Path) -> None:
    make, message = SPECIAL[case]
    make(tmp_path / "it.json")
    with pytest.raises(CheckpointError, match=rf"it\.json: {message}"):
        read_object(tmp_path / "it.json")


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_an_error_of_bounded_length(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        read_small_file(tmp_path / name)
    assert str(error.value).isprintable()


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_object(tmp_path / "it.json") is read_object(tmp_path / "dangling") is None


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, [1], pytest.param(10**5000, id="5000 digits")])
def test_only_a_whole_number_in_range_is_a_size(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^the size must be (a positive integer|at most \d+), not ") as error:
        integer(value, "the size")
    assert len(str(error.value)) < 100


def test_a_range_is_part_of_the_message() -> None:
    assert integer(5, "it", least=5, most=5) == 5
    with pytest.raises(ConfigError, match="it must be an integer of at least 5, not 4"):
        integer(4, "it", least=5)
    with pytest.raises(ConfigError, match="it must be at most 5, not 6"):
        integer(6, "it", most=5)


@pytest.mark.parametrize("value", [0, 2.5, float("nan"), float("inf"), 10**400, True, "1.5", None])
def test_only_a_number_in_range_is_a_number(value: Any) -> None:
    assert number(1, "it", 1, 2) == 1.0
    with pytest.raises(ConfigError, match="it must be a number from 1 to 2, not "):
        number(value, "it", 1, 2)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (boolean, 1, "it must be true or false, not 1"),
        (mapping, [1], r"it must be an object, not \[1\]"),
        (array, "abc", "it must be a list, not 'abc'"),
        (array, {"a": 1}, r"it must be a list, not \{'a': 1\}"),
    ],
)
def test_another_kind_is_refused(check: Callable[[Any, str], Any], value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(value, "it")


def test_a_value_is_shown_in_one_short_printable_line() -> None:
    for value in ("x" * 10**6, "a\nb\x1b[2J", ["\ud800"], 10**5000, {"a": ["b"] * 1000}):
        text = schema.shown(value)
        assert len(text) <= 80
        assert text.isprintable()
