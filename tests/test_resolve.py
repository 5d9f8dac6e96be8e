"""A name becomes a converted folder, once, however many ask for it, and again when its branch has moved."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.convert import scratch
from fastvlm_mlx.errors import CheckpointError, ConfigError, ConversionError
from fastvlm_mlx.inputs.token_tables import TABLES_FILE
from fastvlm_mlx.machine import cache_folder
from fastvlm_mlx.resolve import load, resolve
from tests.checkpoints import SOURCES, changed
from tests.hub import PretendedHub, pretended_hub

APPLE = SOURCES["apple"]
CHILD = """
import sys
from fastvlm_mlx import load
from fastvlm_mlx.resolve import resolve
print(resolve(sys.argv[1], notify=lambda line: print(line, file=sys.stderr)))
load(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def no_scratch(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if ".partial-" in path.name]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_need_the_same_model_at_once_all_get_it(count: int, cache: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(APPLE)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    answers = [(child.communicate(timeout=180), child.returncode) for child in children]
    assert [code for _, code in answers] == [0] * count, answers
    (folder,) = {output.strip() for (output, _), _ in answers}
    assert visible(cache) == [Path(folder).name]
    assert no_scratch(cache)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_threads_that_need_the_same_model_at_once_all_get_it(
    locks: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without locks lets each convert; the first to finish wins, and the others use its folder."""
    if not locks:
        monkeypatch.setattr(scratch, "lock", lambda _: nullcontext())
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(lambda: load(APPLE, lazy=True)[0].config) for _ in range(4)]
    assert len({repr(done.result()) for done in loads}) == 1
    assert len(visible(cache)) == 1
    assert no_scratch(cache)


def test_who_waits_says_for_what(cache: Path) -> None:
    said: list[str] = []
    cache.mkdir()
    key = resolve(APPLE).name
    shutil.rmtree(cache / key)
    with ThreadPoolExecutor() as pool:
        with scratch.lock(cache / f".{key}.lock"):
            waiting = pool.submit(resolve, APPLE, notify=said.append)
            while not said:
                time.sleep(0.01)
            assert not waiting.done()
        assert waiting.result() == cache / key
    assert said == [
        f"waiting for another process that is converting {APPLE}",
        f"the other process gave up; converting {APPLE} into {cache / key}",
    ]


def test_a_process_that_has_stopped_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process keeps its lock; when it goes on, it finds the folder and uses that."""
    monkeypatch.setattr(scratch, "_PATIENCE", 0.3)
    said: list[str] = []
    cache.mkdir()
    key = resolve(APPLE).name
    shutil.rmtree(cache / key)
    with (cache / f".{key}.lock").open("ab") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        assert resolve(APPLE, notify=said.append) == cache / key
    assert said[1:] == [f"the other process shows no sign of life; converting {APPLE} into {cache / key}"]


def test_a_process_that_takes_long_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own, which goes on when there has been a sign of life that was seen."""
    monkeypatch.setattr(scratch, "_SIGN_OF_LIFE", 0.02)
    file = tmp_path / "lock"
    now, looks = 0.0, 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return now

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            time.sleep(0.005)

    monkeypatch.setattr(scratch, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep, time=time.time))

    def hold() -> tuple[bool, float]:
        with scratch.lock(file) as held:
            return held, time.perf_counter()

    with ThreadPoolExecutor() as pool:
        with scratch.lock(file) as held:
            assert held
            waiting = pool.submit(hold)
            for _ in range(10):
                sign = file.stat().st_mtime_ns
                until(lambda sign=sign: file.stat().st_mtime_ns != sign)
                seen = looks
                until(lambda seen=seen: looks > seen + 1)
                now += 0.4 * scratch._PATIENCE
            assert not waiting.done()
            released = time.perf_counter()
        held, taken = waiting.result()
    assert held
    assert taken > released


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 10**6), "truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "without weights"),
        (lambda folder: (folder / "config.json").write_text('{"fastvlm_format": 0}'), "of another version"),
        (lambda folder: (folder / "config.json").unlink(), "without a config"),
        (lambda folder: (folder / "config.json").write_text('{"fastvlm_format": 1}'), "with an empty config"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "without a tokenizer"),
        (lambda folder: os.truncate(folder / "tokenizer.json", 1000), "with half a tokenizer"),
        (lambda folder: os.truncate(folder / "model.safetensors.index.json", 10), "with half an index"),
    ],
)
def test_a_damaged_folder_in_the_cache_is_made_again(damage: Callable[[Path], Any], name: str) -> None:
    said: list[str] = []
    folder = resolve(APPLE)
    weights = (folder / "model.safetensors").read_bytes()
    damage(folder)
    assert resolve(APPLE, notify=said.append) == folder
    assert said == [f"{folder}: damaged or from another version; converting {APPLE} again"], name
    assert (folder / "model.safetensors").read_bytes() == weights
    assert no_scratch(folder.parent)
    assert resolve(APPLE, notify=said.append) == folder
    assert len(said) == 1


def test_what_does_not_fit_float16_is_converted_to_float32(tmp_path: Path) -> None:
    def double(values: dict[str, Any]) -> None:
        for name, value in values.items():
            values[name] = np.asarray(value * 2, value.dtype)

    said: list[str] = []
    source = changed(APPLE, tmp_path / "source", edit=double)
    folder = resolve(source, notify=said.append)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert said[1:] == [
        "vision_tower.conv_exp.se.reduce.weight holds 6.77e+11, too large for float16; converting to float32 instead"
    ]
    assert no_scratch(folder.parent)
    assert resolve(source, notify=said.append) == folder
    assert len(said) == 2


def test_damage_that_only_loading_shows_is_made_good_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = resolve(APPLE)
    name = "language_model.model.norm.weight"
    damaged = changed(folder, tmp_path / "damaged", edit=lambda values: values.pop(name))
    shutil.rmtree(folder)
    damaged.rename(folder)
    load(APPLE, notify=said.append)
    assert said == [f"{folder}: lacks {name}; convert the checkpoint again; converting {APPLE} again"]
    load(APPLE, notify=said.append)
    assert len(said) == 1


def test_damage_in_a_folder_of_the_user_is_an_error(converted: Callable[..., Path], tmp_path: Path) -> None:
    name = "language_model.model.norm.weight"
    folder = changed(converted("apple"), tmp_path / "own", edit=lambda values: values.pop(name))
    before = sorted(path.stat().st_mtime_ns for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(folder)
    assert sorted(path.stat().st_mtime_ns for path in folder.iterdir()) == before


def test_damaged_tables_of_a_tokenizer_are_made_again_in_the_cache_and_said_once() -> None:
    folder, said = resolve(APPLE), []
    whole = (folder / TABLES_FILE).read_bytes()
    (folder / TABLES_FILE).write_bytes(whole[:-1])
    load(APPLE, notify=said.append)
    assert said == [f"{folder / TABLES_FILE}: is damaged; making it again from tokenizer.json"]
    load(APPLE, notify=said.append)
    assert len(said) == 1
    assert (folder / TABLES_FILE).read_bytes() == whole


def test_damaged_tables_in_a_folder_of_the_user_are_left_as_they_are(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder, said = shutil.copytree(converted("apple"), tmp_path / "own"), []
    (folder / TABLES_FILE).write_bytes(b"damaged")
    _, processor = load(folder, notify=said.append)
    assert [str(line).partition("; ")[0] for line in said] == [f"{folder / TABLES_FILE}: is not a file of this version"]
    assert "convert the checkpoint again" in said[0]
    assert processor.tokenizer.decode(processor.tokenizer.encode("a sign")) == "a sign"
    assert (folder / TABLES_FILE).read_bytes() == b"damaged"


def test_a_failed_conversion_is_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
        with pytest.raises(ConversionError, match="are free there"):
            resolve(APPLE)
    assert list(cache.iterdir()) == []
    assert resolve(APPLE).is_dir()


def test_a_cache_that_cannot_be_made_names_the_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    with pytest.raises(ConversionError, match=r"cannot be made: .*; set FASTVLM_CACHE to a folder for models"):
        resolve(APPLE)
    monkeypatch.delenv("FASTVLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/fastvlm-mlx")

    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(CheckpointError, match="there is no home folder; set FASTVLM_CACHE"):
        cache_folder()


def test_a_source_that_is_exchanged_is_noticed_whatever_its_times_say(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folders = []
    for value in (1, 2):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        source = changed(APPLE, tmp_path / "source", edit=lambda values: values[name].fill(value))  # noqa: B023
        for file in source.iterdir():
            os.utime(file, (1, 1))
        folders.append(resolve(source))
        assert resolve(source) == folders[-1]
    assert folders[0] != folders[1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedHub]:
    with pretended_hub(tmp_path / "hub", monkeypatch) as pretended:
        pretended.put("someone/tiny", APPLE)
        yield pretended


def asked(hub: PretendedHub) -> int:
    """How often the Hub was asked which commit the branch points to."""
    return hub.requests.count("GET /api/models/someone/tiny/revision/main?expand=sha")


def days_pass(folder: Path, days: float) -> None:
    """Makes a conversion, and the last question about it, older."""
    for file in (folder / "config.json", folder.with_name(f".{folder.name}.asked")):
        if file.exists():
            moment = file.stat().st_mtime - days * 86400
            os.utime(file, (moment, moment))


def commit(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["source"]["revision"])


def test_a_branch_that_has_moved_is_converted_again(hub: PretendedHub, cache: Path) -> None:
    said: list[str] = []
    folder = resolve("someone/tiny", notify=said.append)
    old = hub.branches["someone/tiny@main"]
    download = "downloading someone/tiny from the Hub: 1.93 MB; no licence is named"
    assert said == [download, f"converting someone/tiny once, into {folder}"]
    assert commit(folder) == old
    new = hub.put("someone/tiny", APPLE)
    days_pass(folder, 1.1)
    assert resolve("someone/tiny", notify=said.append) == folder
    assert said[2:] == [f"someone/tiny: main has moved to {new[:12]} on the Hub; converting it again", download]
    assert commit(folder) == new
    assert visible(cache) == [folder.name]
    assert no_scratch(cache)
    assert resolve("someone/tiny", notify=said.append) == folder
    assert (asked(hub), len(said)) == (1, 4)


def test_the_hub_is_asked_once_a_day(hub: PretendedHub) -> None:
    folder = resolve("someone/tiny")
    sent = hub.sent
    for days, times in ((0.9, 0), (0.2, 1), (0.9, 1), (0.2, 2)):
        days_pass(folder, days)
        resolve("someone/tiny")
        assert asked(hub) == times
    assert hub.sent == sent


def test_a_commit_is_never_asked_about(hub: PretendedHub) -> None:
    revision = hub.branches["someone/tiny@main"]
    folder = resolve("someone/tiny", revision=revision)
    hub.requests.clear()
    days_pass(folder, 99)
    assert resolve("someone/tiny", revision=revision) == folder
    assert hub.requests == []


@pytest.mark.parametrize("silent", [True, False], ids=["down", "a hotel's page"])
def test_without_an_answer_the_conversion_is_used_and_the_hub_left_alone_for_an_hour(
    silent: bool, hub: PretendedHub
) -> None:
    said: list[str] = []
    folder = resolve("someone/tiny")
    old = commit(folder)
    hub.put("someone/tiny", APPLE)
    hub.down, hub.page = silent, b"<html>log in to this hotel's network</html>"
    days_pass(folder, 2)
    for times in (1, 1):
        assert commit(resolve("someone/tiny", notify=said.append)) == old
        assert asked(hub) == times
    days_pass(folder, 1.1 / 24)
    resolve("someone/tiny", notify=said.append)
    assert asked(hub) == 2
    assert not said


def test_a_hub_that_does_not_answer_in_time_is_not_waited_for(
    hub: PretendedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.resolve._HUB_TIMEOUT", 0.1)
    folder = resolve("someone/tiny")
    old = commit(folder)
    hub.put("someone/tiny", APPLE)
    hub.delay = 60
    days_pass(folder, 2)
    start = time.perf_counter()
    assert commit(resolve("someone/tiny")) == old
    assert time.perf_counter() - start < 50


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nobody_is_asked(variable: str, hub: PretendedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("someone/tiny")
    old, new = commit(folder), hub.put("someone/tiny", APPLE)
    days_pass(folder, 99)
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert commit(resolve("someone/tiny")) == old
    assert hub.requests == []
    monkeypatch.setenv(variable, "0")
    assert commit(resolve("someone/tiny")) == new


def test_a_branch_that_cannot_be_converted_again_is_used_as_it_is(hub: PretendedHub) -> None:
    said: list[str] = []
    folder = resolve("someone/tiny")
    old = commit(folder)
    hub.put("someone/tiny", APPLE, without=("*.safetensors",))
    days_pass(folder, 2)
    assert commit(resolve("someone/tiny", notify=said.append)) == old
    assert said[1:] == [
        f"someone/tiny: on the Hub it lacks model.safetensors; using the conversion of {old[:12]}",
    ]


def test_two_revisions_never_share_a_conversion(hub: PretendedHub) -> None:
    hub.put("someone/tiny", SOURCES["apple-untied"], branch="a/b")
    hub.put("someone/tiny", APPLE, branch="a--b")
    folders = {resolve("someone/tiny", revision=revision) for revision in (None, "a/b", "a--b")}
    assert len(folders) == 3


def test_a_revision_of_a_folder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is on this disk, where revision 'v1' would change nothing"):
        resolve(APPLE, revision="v1")


def test_nothing_is_downloaded_for_a_dtype_that_does_not_exist(hub: PretendedHub) -> None:
    with pytest.raises(ConfigError, match="dtype must be"):
        load("someone/tiny", dtype="float17")
    assert hub.requests == []
