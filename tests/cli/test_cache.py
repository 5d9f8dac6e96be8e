"""`fastvlm cache` shows what the cache holds and removes what it is told to, and nothing else."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastvlm_mlx.cli.app import app
from tests.conftest import Converted

DAY = 86400


def invoke(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments], **options)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Converted) -> Path:
    """A cache with a model from a folder, one from the Hub, and answers."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTVLM_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = tmp_path / "source"
    source.mkdir()
    for name, origin, days in (
        ("source-0123456789ab", str(source), 40),
        ("apple--FastVLM-0.5B@main-0123456789ab", "apple/FastVLM-0.5B@main", 1),
    ):
        shutil.copytree(converted("apple"), folder / name)
        mark = folder / f".{name}.used"
        mark.write_text(origin)
        os.utime(mark, (time.time() - days * DAY,) * 2)
    (folder / "eval").mkdir()
    for name, days in (("old", 31), ("new", 29)):
        path = folder / "eval" / f"{name}.jsonl"
        path.write_text("{}\n")
        os.utime(path, (time.time() - days * DAY,) * 2)
    (folder / "precious.txt").write_text("the user's own")
    blobs = tmp_path / "hub" / "models--apple--FastVLM-0.5B" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "weights").write_bytes(bytes(1234))
    return folder


def there(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in [*cache.glob("[!.]*"), *cache.glob("eval/*")]} - {"eval"}


def test_the_list_has_name_kind_size_last_use_and_origin(cache: Path, tmp_path: Path) -> None:
    text = invoke().stdout
    first, _, header, *rows = text.splitlines()
    assert first.startswith(f"{cache}: ")
    assert header.split() == ["name", "kind", "size", "last", "used", "from"]
    assert rows[0].startswith("apple--FastVLM-0.5B@main-0123456789ab  model")
    assert "apple/FastVLM-0.5B@main (commit None)" in rows[0]
    assert rows[1].endswith(f"{tmp_path / 'source'} (source has changed)")
    assert rows[2].startswith("eval  ")
    assert rows[2].endswith("2 runs of fastvlm eval")
    assert "precious" not in text


def test_the_share_of_the_hub_is_shown_and_never_touched(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--apple--FastVLM-0.5B"
    record = json.loads(invoke("--json").stdout)
    assert record["hub"] == {"apple/FastVLM-0.5B": {"path": str(folder), "size_bytes": 1234}}
    assert f"apple/FastVLM-0.5B  1.23 kB  {folder}" in invoke().stdout
    assert invoke("rm", "--all", "--yes").exit_code == 0
    assert (folder / "blobs" / "weights").is_file()


def test_json_has_every_item(cache: Path) -> None:
    record = json.loads(invoke("--json").stdout)
    assert record["cache"] == str(cache)
    assert [(item["name"], item["kind"], item["in_use"]) for item in record["items"]] == [
        ("apple--FastVLM-0.5B@main-0123456789ab", "model", False),
        ("eval/new.jsonl", "answers", False),
        ("eval/old.jsonl", "answers", False),
        ("source-0123456789ab", "model", False),
    ]


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [
        (["source-0123456789ab"], {"source-0123456789ab"}),
        (["0.5b"], {"apple--FastVLM-0.5B@main-0123456789ab"}),
        (["apple/FastVLM-0.5B", "eval"], {"apple--FastVLM-0.5B@main-0123456789ab", "eval/old.jsonl", "eval/new.jsonl"}),
        (["eval/old.jsonl"], {"eval/old.jsonl"}),
        (["--older-than", "30d"], {"source-0123456789ab", "eval/old.jsonl"}),
        (["--older-than", "6w"], set()),
        (["eval", "--older-than", "30d"], {"eval/old.jsonl"}),
        (
            ["--all"],
            {"source-0123456789ab", "apple--FastVLM-0.5B@main-0123456789ab", "eval/old.jsonl", "eval/new.jsonl"},
        ),
    ],
)
def test_what_is_named_is_removed_and_nothing_else(arguments: list[str], removed: set[str], cache: Path) -> None:
    before = there(cache)
    result = invoke("rm", *arguments)
    assert result.exit_code == 0
    assert before - there(cache) == removed
    assert {line.split()[1].rstrip(",") for line in result.stdout.splitlines()} == removed
    assert (cache / "precious.txt").is_file()


def test_a_source_is_a_name_too(cache: Path, tmp_path: Path) -> None:
    assert invoke("rm", str(tmp_path / "source")).exit_code == 0
    assert "source-0123456789ab" not in there(cache)
    assert (tmp_path / "source").is_dir()


@pytest.mark.parametrize("name", ["nonsense", "../source", "precious.txt", "..", ".", "/", "~nosuchuser", "", "hub"])
def test_a_name_that_stands_for_nothing_is_an_error_and_nothing_is_removed(name: str, cache: Path) -> None:
    before = there(cache)
    result = invoke("rm", "eval", name)
    assert result.exit_code == 1
    assert "is not in the cache, which holds apple--FastVLM" in result.stderr
    assert there(cache) == before


@pytest.mark.parametrize("arguments", [[], ["--older-than", "soon"], ["--older-than", "-3d"], ["--older-than", "3"]])
def test_what_to_remove_has_to_be_said(arguments: list[str], cache: Path) -> None:
    before = there(cache)
    assert invoke("rm", *arguments).exit_code == 2
    assert there(cache) == before


@pytest.mark.parametrize(("answer", "gone"), [("n\n", False), ("y\n", True), ("", False)])
def test_on_a_terminal_it_asks(answer: str, gone: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.cli.cache.is_terminal", lambda: True)
    result = invoke("rm", "eval", input=answer)
    assert "eval/old.jsonl, 3 B" in result.stderr
    assert "Remove 6 B?" in result.stderr
    assert ("eval/old.jsonl" not in there(cache)) == gone
    assert result.exit_code == (0 if gone else 1)
    assert invoke("rm", "source-0123456789ab", "--yes").exit_code == 0  # without a question
    assert "source-0123456789ab" not in there(cache)


def test_what_is_in_use_is_kept_and_the_exit_code_says_so(cache: Path) -> None:
    import fcntl

    with (cache / ".source-0123456789ab.used").open("ab") as mark:
        fcntl.flock(mark, fcntl.LOCK_SH)
        assert "(source has changed, in use)" in invoke().stdout
        result = invoke("rm", "--all", "--yes")
    assert result.exit_code == 3
    assert result.stderr == "source-0123456789ab: kept, because a running process uses it\n"
    assert there(cache) == {"source-0123456789ab", "precious.txt"}


def test_an_empty_cache_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "nowhere"))
    assert invoke().stdout.startswith(f"{tmp_path / 'nowhere'}: empty\n")
    result = invoke("rm", "--all")
    assert (result.exit_code, result.stderr) == (0, "nothing to remove\n")
    assert not (tmp_path / "nowhere").exists()
