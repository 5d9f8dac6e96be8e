"""Repositories on the Hub: known by their headers, downloaded at one commit, found again in the Hub's cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_mlx.convert import plan
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.errors import CheckpointError, ConversionError
from tests.checkpoints import SOURCES
from tests.hub import PretendedHub, pretended_hub

APPLE = SOURCES["apple"]
NAME = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedHub]:
    with pretended_hub(tmp_path / "hub", monkeypatch) as pretended:
        yield pretended


def snapshot(hub: PretendedHub, commit: str, name: str = NAME) -> Path:
    return hub.cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit


def opened(name: str = NAME, revision: str | None = None) -> tuple[Path, str | None, list[str]]:
    """The folder and the revision of a source, and what was said on the way."""
    said: list[str] = []
    with open_source(name, revision, notify=said.append) as source:
        return source.folder, source.revision, said


@pytest.mark.parametrize("name", ["0.5b", "0.5B", "apple/FastVLM-0.5B"])
def test_an_alias_is_a_hub_repository_and_its_commit_is_recorded(name: str, hub: PretendedHub) -> None:
    commit = hub.put("apple/FastVLM-0.5B", APPLE)
    with open_source(name, revision="main") as source:
        assert (source.name, source.revision) == ("apple/FastVLM-0.5B", commit)


def test_a_download_says_its_size_and_the_licence_first(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE)
    hub.put("apple/FastVLM-7B", APPLE)
    assert opened("7b")[2] == [
        "downloading apple/FastVLM-7B from the Hub: 1.93 MB; Apple's research licence: for research only"
    ]
    hub.card = {"license": "other", "license_name": "tiny-licence"}
    assert opened()[2] == [f"downloading {NAME} from the Hub: 1.93 MB; licence: other tiny-licence"]
    assert opened()[2] == []


def test_a_download_takes_what_a_conversion_needs_and_nothing_else(hub: PretendedHub, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(APPLE, source)
    for name in ("pytorch_model.bin", "modeling.py", "picture.png", "LICENSE"):
        (source / name).write_text("text")
    (source / "original").mkdir()
    shutil.copy(source / "model.safetensors", source / "original")
    folder = opened()[0] if hub.put(NAME, source) else None
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {path.name for path in APPLE.iterdir()} | {"LICENSE"}


def test_a_repository_that_is_no_checkpoint_costs_no_download(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE, without=("vocab.json", "tokenizer.json"))
    with pytest.raises(CheckpointError, match=f"{NAME}: on the Hub it lacks vocab.json"):
        opened()
    hub.put(NAME, APPLE, without=("*.safetensors",))
    with pytest.raises(CheckpointError, match=r"on the Hub it lacks model.safetensors"):
        opened()
    assert hub.sent == 0


@pytest.mark.parametrize("layout", ["apple", "apple-untied", "transformers", "mlx-vlm-q4"])
def test_a_plan_from_the_hub_is_that_of_the_folder_and_downloads_nothing(layout: str, hub: PretendedHub) -> None:
    hub.put(NAME, SOURCES[layout])
    (SOURCES[layout] / "model.safetensors").stat()
    planned = plan(NAME)
    assert str(planned).replace(NAME, str(SOURCES[layout])) == str(plan(SOURCES[layout]))
    assert hub.sent < 400_000
    assert not hub.cache.exists()
    assert planned.config.source["revision"] == hub.branches[f"{NAME}@main"]


def test_a_plan_takes_a_complete_copy_in_the_cache_instead(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE)
    opened()
    before = hub.sent
    plan(NAME)
    assert hub.sent == before


def test_a_vision_source_is_known_by_its_headers_too(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE)
    hub.put("someone/other", APPLE)
    with pytest.raises(ConversionError, match="has a vision tower of its own"):
        plan(NAME, vision_from="someone/other")
    assert hub.sent < 400_000
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="no such folder"):
        plan(NAME, vision_from="./typo")
    assert hub.requests == []


def test_a_hub_without_ranges_is_an_error_not_a_download(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE)
    hub.ranges, hub.bytes_per_second = False, 50_000
    with pytest.raises(CheckpointError, match="sends whole files only"):
        plan(NAME)
    assert hub.sent < 400_000


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("nobody/nothing", None, r"nobody/nothing: no such folder, and no such repository on the Hub"),
        (NAME, "v9", rf"{NAME}: has no revision v9"),
    ],
)
def test_what_is_not_on_the_hub_is_an_error_that_says_what_to_do(
    name: str, revision: str | None, message: str, hub: PretendedHub
) -> None:
    hub.put(NAME, APPLE)
    for attempt in (opened, plan):
        with pytest.raises(CheckpointError, match=message):
            attempt(name, revision=revision)  # type: ignore[operator]


def offline(hub: PretendedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def down(hub: PretendedHub, _: pytest.MonkeyPatch) -> None:
    hub.down = True


def unreachable(hub: PretendedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("cut_off", [offline, down, unreachable])
@pytest.mark.parametrize("by_plan", [False, True], ids=["download", "plan"])
def test_without_the_hub_what_its_cache_has_is_used(
    by_plan: bool,
    cut_off: Callable[[PretendedHub, pytest.MonkeyPatch], None],
    hub: PretendedHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.put(NAME, APPLE)
    opened()
    cut_off(hub, monkeypatch)
    if by_plan:
        assert plan(NAME).config.source["revision"] == commit
        return
    for revision in (None, "main", commit):
        assert opened(revision=revision)[:2] == (snapshot(hub, commit), commit)
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such folder, not in the Hub's cache, and the Hub"):
        opened("nobody/nothing")


@pytest.mark.parametrize("lacks", ["LICENSE", "special_tokens_map.json"])
def test_a_copy_that_another_program_made_serves_without_what_is_not_needed(
    lacks: str, hub: PretendedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.put(NAME, APPLE)
    opened()
    (snapshot(hub, commit) / lacks).unlink(missing_ok=True)
    listing = {name: {"size": 1, "blob_id": "0" * 40} for name in (lacks, "README.md", "model.safetensors")}
    trees = snapshot(hub, commit).parents[1] / "trees"
    trees.mkdir()
    (trees / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    offline(hub, monkeypatch)
    assert opened()[:2] == (snapshot(hub, commit), commit)


@pytest.mark.parametrize("lacks", ["model.safetensors", "config.json", "vocab.json"])
@pytest.mark.parametrize("cut_off", [offline, unreachable])
def test_a_copy_without_a_needed_file_names_it(
    lacks: str,
    cut_off: Callable[[PretendedHub, pytest.MonkeyPatch], None],
    hub: PretendedHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = hub.put(NAME, APPLE, without=("tokenizer.json",) if lacks == "vocab.json" else ())
    opened()
    (snapshot(hub, commit) / lacks).resolve().unlink()  # a link to it stays
    cut_off(hub, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{NAME}: no such folder, in the Hub's cache without {lacks}, and the"):
        opened()


def test_a_missing_shard_is_named(hub: PretendedHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(APPLE, source)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    hub.put(NAME, source)
    with pytest.raises(CheckpointError, match=r"on the Hub it lacks model-00002-of-00002.safetensors, which"):
        opened()
    offline(hub, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cache without model-00001-of-00002.safetensors, model-00002-of-00002"):
        opened()


@pytest.mark.parametrize("no_branch", [False, True])
def test_an_older_complete_copy_serves_if_the_newest_is_not(
    no_branch: bool, hub: PretendedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have fetched a newer config.json alone, or a cache may have been copied without branches."""
    old = hub.put(NAME, APPLE)
    opened()
    if no_branch:
        shutil.rmtree(snapshot(hub, old).parents[1] / "refs")
    else:
        new = hub.put(NAME, APPLE)
        opened()
        (snapshot(hub, new) / "model.safetensors").unlink()
    offline(hub, monkeypatch)
    folder, revision, said = opened()
    assert (folder, revision) == (snapshot(hub, old), old)
    assert said == ([] if no_branch else [f"{NAME}: using {old[:12]}, the commit that the Hub's cache has completely"])
    with pytest.raises(CheckpointError, match=r"in the Hub's cache without model|not in the Hub's cache"):
        opened(revision="main")


def test_a_file_that_was_cut_off_in_the_cache_is_fetched_again(hub: PretendedHub) -> None:
    commit = hub.put(NAME, APPLE)
    opened()
    os.truncate(snapshot(hub, commit) / "model.safetensors", 1000)
    folder, _, said = opened()
    assert (folder / "model.safetensors").read_bytes() == (APPLE / "model.safetensors").read_bytes()
    assert said == [f"downloading {NAME} from the Hub: 1.91 MB; no licence is named"]


def test_a_download_that_does_not_fit_is_refused_before_it(hub: PretendedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(NAME, APPLE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
    with pytest.raises(CheckpointError, match=r"takes 1.93 MB, but only 1\.00 MB are free in .*; HF_HOME chooses"):
        opened()
    assert hub.sent < 10_000


def test_every_file_is_of_one_commit_even_if_the_branch_moves_meanwhile(hub: PretendedHub) -> None:
    first = hub.put(NAME, APPLE)
    said: list[str] = []

    def move(line: str) -> None:
        said.append(line)
        hub.put(NAME, SOURCES["apple-untied"])

    with open_source(NAME, notify=move) as source:
        assert source.revision == first
        assert source.folder == snapshot(hub, first)
        assert source.sha256(lambda _: None) == source_hash(APPLE)
    assert len(said) == 1


def source_hash(folder: Path) -> str:
    with open_source(folder) as source:
        return source.sha256(lambda _: None)


def test_a_download_reports_its_progress(hub: PretendedHub) -> None:
    hub.put(NAME, APPLE)
    hub.bytes_per_second = 4e6
    seen: list[tuple[int, int, str]] = []
    with open_source(NAME, progress=lambda *state: seen.append(state)):
        pass
    assert seen
    assert {(total, what) for _, total, what in seen} == {(seen[0][1], "downloading")}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_an_interrupt_ends_a_download_at_once(hub: PretendedHub, tmp_path: Path) -> None:
    hub.put(NAME, APPLE)
    hub.bytes_per_second = 10_000  # the whole takes minutes
    command = [sys.executable, "-m", "fastvlm_mlx", "convert", NAME, str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"downloading {NAME}")
        while not any(request.endswith("model.safetensors") for request in hub.requests):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    assert not (tmp_path / "out").exists()
