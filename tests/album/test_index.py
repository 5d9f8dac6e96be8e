"""The file of an album's index: damage, other files in its place, and several who use it."""

import os
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from fastvlm_mlx import ConfigError
from fastvlm_mlx.album.database import DamagedIndexError, index_path
from fastvlm_mlx.album.index import Index
from fastvlm_mlx.cache import items, remove

TOKENS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    return index_path(tmp_path)


def opened(path: Path, folder: str = "/folder", *, own: bool = True) -> Index:
    return Index(path, folder, own=own)


def filled(path: Path, **options) -> Index:
    index = opened(path, **options)
    content = index.add_content("a" * 64, (40, 30), "2026-11-26")
    index.keep_tokens(content, "form", TOKENS)
    index.keep_picture("a.jpg", (1, 2), 0.0, content)
    return index


def test_visual_tokens_are_kept_in_half_precision_unless_one_is_too_large(path):
    with filled(path) as index:
        kept = index.visual_tokens([1], "form")[1]
        assert kept.dtype == np.float16
        np.testing.assert_array_equal(kept, TOKENS)
        index.keep_tokens(1, "form", TOKENS * 1e5)
        kept = index.visual_tokens([1], "form")[1]
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(kept, TOKENS * np.float32(1e5))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tokens SET data = zeroblob(24)",
        "UPDATE tokens SET count = 2",
        "UPDATE tokens SET count = 'three'",
        "UPDATE tokens SET type = 'int8'",
        "UPDATE tokens SET data = 'text'",
    ],
)
def test_damaged_visual_tokens_are_left_out_and_made_again(path, change):
    with filled(path) as index:
        index.all(change)
        tokens = index.visual_tokens([1], "form")
        assert tokens == {} or tokens[1].shape != TOKENS.shape
        if not tokens:
            assert index.described("form", [], []) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a database at all" * 100,
        lambda data: data[:5000],
        lambda data: data[:100] + bytes(len(data) - 100),
        lambda data: data[:60] + b"\xff\xff\xff\xff" + data[64:],
    ],
    ids=["empty", "text", "cut", "zeros", "another version"],
)
def test_a_damaged_index_in_the_cache_is_made_anew(path, damage):
    filled(path).close()
    data = path.read_bytes()
    path.write_bytes(damage(data))
    with opened(path) as index:
        assert index.pictures() == []
        assert index.rebuilt == (damage(data) != b"")
        index.keep_picture("b.jpg", (), 0.0, None, "no picture")
        assert [picture.path for picture in index.pictures()] == ["b.jpg"]


def test_damage_that_is_found_later_is_told_and_the_index_can_be_made_anew(path):
    with filled(path) as index:
        index.all("DROP TABLE captions")
        with pytest.raises(DamagedIndexError, match=r"is damaged \(no such table: captions\)"):
            index.texts(1)
        index.rebuild()
        assert index.rebuilt
        assert index.texts(1) == {}


def test_a_users_damaged_index_is_kept_under_another_name(path, tmp_path):
    own = tmp_path / "mine.sqlite"
    filled(own, own=False).close()
    own.write_bytes(own.read_bytes()[:3000])
    with opened(own, own=False) as index:
        assert index.rebuilt
    assert (tmp_path / "mine.sqlite.damaged").stat().st_size == 3000


@pytest.mark.parametrize("content", [b"\xff\xd8\xffphoto", b"SQLite format 3\0" + bytes(200)])
def test_a_users_file_that_is_no_index_is_refused_and_stays(path, tmp_path, content):
    other = tmp_path / "other"
    other.write_bytes(content)
    with pytest.raises(ConfigError, match="is not the index of an album; name another file"):
        opened(other, own=False)
    assert other.read_bytes() == content


def test_the_database_of_another_program_is_refused(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    before = other.read_bytes()
    with pytest.raises(ConfigError, match="is not the index of an album"):
        opened(other, own=False)
    assert other.read_bytes() == before


def test_the_index_of_another_folder_is_refused_unless_that_has_moved(tmp_path):
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "x.sqlite"
    first.mkdir()
    second.mkdir()
    opened(path, str(first), own=False).close()
    with pytest.raises(ConfigError, match=r"is the index of .*first; name another file"):
        opened(path, str(second), own=False)
    first.rmdir()
    opened(path, str(second), own=False).close()
    opened(path, str(second), own=False).close()


@pytest.mark.parametrize("name", ["missing/x.sqlite", "."])
def test_an_index_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be"):
        opened(tmp_path / name, own=False)


def test_threads_and_connections_share_an_index(path):
    errors = []

    def write(index: Index, start: int) -> None:
        try:
            for number in range(start, start + 20):
                with index.changing():
                    content = index.add_content(f"{number:064}", None, "")
                    index.keep_tokens(content, "form", TOKENS)
                    index.keep_picture(f"{number}.jpg", (number,), 0.0, content)
                index.pictures()
        except ConfigError as err:
            errors.append(err)

    with opened(path) as first, opened(path) as second:
        threads = [threading.Thread(target=write, args=each) for each in ((first, 0), (first, 20), (second, 40))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(first.pictures()) == len(second.pictures()) == 60
        assert len(first.described("form", [], [])) == 60


def test_names_that_are_not_utf8_come_back_as_they_were(path):
    name = os.fsdecode(b"caf\xe9.jpg")
    with filled(path) as index:
        index.keep_picture(name, (3,), 0.0, 1)
        assert name in {picture.path for picture in index.pictures()}


def test_the_cache_shows_an_index_and_keeps_it_while_it_is_open(path, tmp_path):
    with filled(path, folder=str(tmp_path)):
        (item,) = items()
        assert (item.kind, item.source, item.remark, item.in_use) == ("album", str(tmp_path), "", True)
        assert item.name == f"albums/{path.name}"
        assert not remove(item)
    (item,) = items()
    assert not item.in_use
    assert remove(item)
    assert items() == []
    assert list(path.parent.iterdir()) == []
