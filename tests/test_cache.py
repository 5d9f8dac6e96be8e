"""The cache folder: one conversion for one source, marks of use, and removal of what nobody uses."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from fastvlm_mlx.cache import Item, _used, cache_folder, entry, items, remove, use
from fastvlm_mlx.checkpoint.released import Location, parse_name
from fastvlm_mlx.convert import scratch
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.resolve import find, resolve
from tests.checkpoints import SOURCES, in_first_format
from tests.conftest import Converted

APPLE = SOURCES["apple"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(source: Path) -> Path:
    """The folder of a conversion that no process uses, as if this one had ended."""
    folder = resolve(source)
    while _used:
        os.close(_used.popitem()[1])
    return folder


def only(kind: str = "model") -> Item:
    (item,) = [item for item in items() if item.kind == kind]
    return item


def copied(source: Path, target: Path) -> Location:
    shutil.copytree(source, target)
    return Location(name="demo", path=target, bundled=True)


def test_environments_with_the_same_demo_share_a_conversion(tmp_path: Path) -> None:
    demo = parse_name("demo")
    assert demo.path is not None
    first, second = (copied(demo.path, tmp_path / name / "demo_model") for name in ("one", "two"))
    assert entry(first, None) == entry(second, None) == entry(demo, None)
    assert second.path is not None
    with (second.path / "model.safetensors").open("r+b") as weights:  # another training changes all weights
        weights.seek(-2_000_000, os.SEEK_END)
        weights.write(bytes(1_000_000))
    assert entry(first, None) != entry(second, None)


def test_another_version_of_the_format_has_folders_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = entry(parse_name("demo"), None)
    monkeypatch.setattr("fastvlm_mlx.cache.FORMAT_VERSION", 99)
    assert entry(parse_name("demo"), None) != first


def test_a_conversion_in_version_1_of_the_format_is_used_and_said_to_be_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(APPLE, source)
    second = resolve(source)
    first = in_first_format(second, entry(parse_name(source), None, 1))
    shutil.rmtree(second)
    use(first, str(source))
    lines: list[str] = []
    assert resolve(source, notify=lines.append) == find(source) == first
    assert not lines
    (remark,) = {item.remark for item in items() if item.path == first}
    assert remark == "format 1, which loads more slowly"
    (first / "model.safetensors").unlink()
    assert resolve(source) == second


@pytest.mark.parametrize("name", ["猫" * 80, "x" * 255, "with spaces; and $signs", "é-\udcff"])
def test_any_name_of_a_source_gives_a_name_that_a_folder_can_have(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    source.mkdir()
    (source / "config.json").write_text("{}")
    folder = entry(Location(name=name, path=source), None)
    assert folder.parent == cache_folder()
    assert len(os.fsencode(f".{folder.name}.used")) <= 255
    assert " " not in folder.name


def test_a_model_says_where_it_is_from_and_whether_that_still_holds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(APPLE, source)
    folder = made(source)
    item = only()
    assert (item.name, item.source, item.remark, item.in_use) == (folder.name, str(source), "", False)
    assert item.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    (source / "config.json").touch()
    assert only().remark == "source has changed"
    shutil.rmtree(source)
    assert only().remark == "source is gone"
    os.truncate(folder / "config.json", 10)
    assert (only().source, only().remark) == (str(source), "damaged")


def test_a_use_is_seen(cache: Path) -> None:
    folder = made(APPLE)
    os.utime(cache / f".{folder.name}.used", (1, 1))
    assert only().last_used == 1
    made(APPLE)
    assert only().last_used > 1e9


def test_a_model_that_this_process_has_loaded_is_not_removed() -> None:
    folder = resolve(APPLE)
    assert only().in_use
    assert not remove(only())
    assert resolve(APPLE) == folder


def test_a_model_that_is_used_by_its_folder_is_in_use_too_and_a_folder_of_the_user_gets_no_mark(
    cache: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(APPLE)
    assert resolve(folder) == folder
    assert (only().in_use, only().source) == (True, str(APPLE))
    own = cache / "int4"
    shutil.copytree(converted("apple"), own)
    assert resolve(own) == own
    monkeypatch.chdir(own)
    assert resolve(".") == Path(".")
    assert [item.name for item in items()] == [folder.name]


def test_a_model_that_is_being_converted_is_not_removed(cache: Path) -> None:
    folder = made(APPLE)
    with scratch.lock(cache / f".{folder.name}.lock"):
        assert only().in_use
        assert not remove(only())
    assert folder.is_dir()


def test_a_model_that_nobody_uses_is_removed_without_a_trace(cache: Path) -> None:
    made(APPLE)
    assert remove(only())
    assert list(cache.iterdir()) == []


def test_what_somebody_else_put_there_is_neither_shown_nor_removed(
    cache: Path, tmp_path: Path, converted: Converted
) -> None:
    shutil.copytree(converted("apple"), tmp_path / "own")
    cache.mkdir()
    (cache / "link").symlink_to(tmp_path / "own")
    shutil.copytree(converted("apple"), cache / "int4")
    (cache / "notes.txt").write_text("mine")
    (cache / "0123456789ab-0123456789ab").mkdir()
    assert items() == []


def test_a_link_in_place_of_a_model_is_left_alone(cache: Path, tmp_path: Path) -> None:
    folder = made(APPLE)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert items() == []


def test_conversions_of_an_earlier_version_are_known_by_their_names(cache: Path) -> None:
    folder = made(APPLE)
    shutil.copytree(folder, cache / "someone--tiny@main")
    shutil.copytree(folder, cache / "reparam-0123456789ab")
    (cache / f".{folder.name}.used").unlink()
    assert {item.remark for item in items()} == {"made by an earlier version"}
    assert len([remove(item) for item in items()]) == 3
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_file_system_without_locks_shows_everything_and_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There nobody can know whether a process uses a model."""
    folder = made(APPLE)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fastvlm_mlx.cache.fcntl.flock", no_locks)
    assert resolve(APPLE) == folder
    assert not only().in_use
    with pytest.raises(ConversionError, match="cannot be removed: No locks available"):
        remove(only())
    assert resolve(APPLE) == folder


def test_answers_are_kept_while_they_are_written(cache: Path) -> None:
    (cache / "eval").mkdir(parents=True)
    path = cache / "eval" / "0123.jsonl"
    path.write_text("{}\n")
    assert (only("answers").name, only("answers").in_use) == ("eval/0123.jsonl", False)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert only("answers").in_use
        assert not remove(only("answers"))
    assert remove(only("answers"))
    assert not path.exists()


def test_what_a_killed_process_left_is_shown_and_removed(cache: Path) -> None:
    left = cache / ".source-0123456789ab.partial-x"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(1000))
    (left / ".fastvlm-lock").write_text("")
    assert only("leftover").size_bytes == 1000
    with (left / ".fastvlm-lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not remove(only("leftover"))
    assert remove(only("leftover"))
    assert list(cache.iterdir()) == []


def test_a_model_that_is_removed_while_it_is_looked_up_is_made_again(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    folder = made(APPLE)

    def too_late(folder: Path, source: str) -> None:
        shutil.rmtree(folder)
        monkeypatch.undo()
        monkeypatch.setenv("FASTVLM_CACHE", str(cache))

    monkeypatch.setattr("fastvlm_mlx.resolve.use", too_late)
    assert resolve(APPLE) == folder
    assert folder.is_dir()
