"""`fastvlm caption --shard` and under `mlx.launch`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli.app import app
from fastvlm_mlx.jobs.shards import shard_of
from tests.checkpoints import APPLE

SOURCES = ("landscape.png", "portrait.png", "square.png", "tiny.png")
NAMES = ("1.png", "2.png", "3.png", "4.png")


@pytest.fixture
def model(converted: Callable[..., Path]) -> str:
    return str(converted("apple"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for source, name in zip(SOURCES, NAMES, strict=True):
        shutil.copy(APPLE / "images" / source, photos / name)
    return photos


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["caption", "photos", "-n", "3", *arguments])


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_shard_asks_about_its_pictures_only_and_says_which_it_is(model: str, folder: Path) -> None:
    for number in (1, 2):
        result = run("-m", model, "--shard", f"{number}/2", "-o", f"{number}.jsonl")
        mine = [name for name in NAMES if shard_of(name, 2) == number]
        assert result.exit_code == 0
        assert f"4 pictures, {len(mine)} of them in shard {number}/2, {len(mine)} to do" in result.stderr
        first, *rest = records(folder.parent / f"{number}.jsonl")
        assert (first["shard"], first["pictures"], first["of"]) == (f"{number}/2", len(mine), 4)
        assert [record["file"] for record in rest] == mine
        before = (folder.parent / f"{number}.jsonl").read_bytes()
        assert (
            f"{len(mine)} done, 0 to do" in run("-m", model, "--shard", f"{number}/2", "-o", f"{number}.jsonl").stderr
        )
        assert (folder.parent / f"{number}.jsonl").read_bytes() == before


def test_each_rank_of_a_launcher_writes_a_journal_of_its_own(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("MLX_RANK", rank)
        assert run("-m", model, "-o", "captions.jsonl").exit_code == 0
    parts = [records(folder.parent / f"captions.{number}-of-2.jsonl") for number in (1, 2)]
    assert sorted(record["file"] for part in parts for record in part if "file" in record) == sorted(NAMES)
    assert not Path("captions.jsonl").exists()


def test_a_picture_that_fails_for_one_rank_is_no_reason_for_a_launcher_to_end_the_others(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        (folder / name).write_bytes(b"nothing")
    assert run("-m", model, "--shard", "1/2").exit_code == 3
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    monkeypatch.setenv("MLX_RANK", "0")
    result = run("-m", model, "-o", "captions.jsonl")
    assert result.exit_code == 0
    assert "failed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "3/2"), "'3/2' is not like 2/8, the second of eight"),
        (("--shard", "1/2", "--csv", "t.csv"), "is one for all pictures, and this is shard 1/2; `fastvlm merge`"),
        (("--shard", "1/2", "--hf"), "--hf: is one for all pictures"),
    ],
)
def test_what_a_shard_cannot_do_is_refused(arguments: tuple[str, ...], message: str, model: str, folder: Path) -> None:
    result = run("-m", model, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
