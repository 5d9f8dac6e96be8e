"""Journals of several workers as one."""

import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs import sorting
from fastvlm_mlx.jobs.caption import CaptionJob
from fastvlm_mlx.jobs.journal import Journal
from fastvlm_mlx.jobs.merging import merge
from fastvlm_mlx.jobs.pictures import find_pictures
from fastvlm_mlx.jobs.shards import Shard, shard_of
from fastvlm_mlx.jobs.sorting import name_in, sort_key
from fastvlm_mlx.jobs.task import Task

TASK = Task(questions={"text": "What is it?"}, model="demo", weights="w" * 8, dtype="float32")
NAMES = [f"{folder}/{number}.jpg" for folder in ("a", "b") for number in range(1, 13)]


def record(name: str, text: str | None = "A dog.", **more: Any) -> dict[str, Any]:
    outcome = {"text": text} if text is not None else {"error": {"type": "ImageError", "message": f"{name}: torn"}}
    content = {"sha256": f"of {name}", "stat": [], "settings": TASK.settings}
    return {"fingerprint": f"{name} {more}", "file": name, **outcome, **content, **more}


def write(path: Path, records: Sequence[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(each) for each in records) + end)
    return path


def shards(folder: Path, total: int = 3) -> list[Path]:
    """The journals of finished shards of `NAMES`."""
    paths = []
    for number in range(1, total + 1):
        paths.append(folder / f"{number}.jsonl")
        with Journal(paths[-1]) as journal:
            job = CaptionJob(TASK, journal)
            mine = [name for name in NAMES if shard_of(name, total) == number]
            job.keep_shard(Shard(number, total), len(mine), len(NAMES))
            for name in mine:
                journal.add(name, {key: value for key, value in record(name).items() if key != "fingerprint"})
    return paths


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_merged_shards_are_in_the_order_of_one_run(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    random.Random(0).shuffle(paths)
    merged = merge(paths, tmp_path / "all.jsonl")
    assert [each["file"] for each in read(tmp_path / "all.jsonl")] == NAMES
    assert (merged.records, merged.failed, merged.repeated, merged.missing) == (24, 0, 0, [])
    assert merged.settings == TASK.settings


def test_names_are_in_the_order_in_which_pictures_are_found(tmp_path: Path) -> None:
    names = "b/2.png b/10.png a.png a/1.png A2.png a/01.png a/1b.png a-1.png z9/8.png z10/8.png ä.png 7.png a/b/c.png"
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [picture.name for picture in find_pictures([str(tmp_path)]).found]
    assert sorted(found, key=sort_key) == found
    assert all(name_in(sort_key(name, "kind")) == name for name in [*found, "http://a//b/1.png", "\udcff.png"])


def test_missing_and_unfinished_shards_are_named(tmp_path: Path) -> None:
    first, second, third = shards(tmp_path)
    second.write_text("".join(second.read_text().splitlines(keepends=True)[:3]))
    merged = merge([first, second], tmp_path / "all.jsonl")
    count = sum(shard_of(name, 3) == 2 for name in NAMES)
    assert merged.missing == ["no journal of shard 3/3", f"shard 2/3 is not done: 2 of {count} pictures"]
    again = merge([third], tmp_path / "all.jsonl")  # what is there is kept
    assert again.missing == []
    assert again.records == 24 - (count - 2)


def test_shards_of_other_pictures_are_told_apart(tmp_path: Path) -> None:
    first, second, _ = shards(tmp_path)
    lines = read(second)
    write(second, [{**lines[0], "of": 20}, *lines[1:]])
    merged = merge([first, second], tmp_path / "all.jsonl")
    assert merged.missing[0] == "shards were made of 24 and of 20 pictures: do all machines see the same?"


def test_a_shard_run_twice_and_overlapping_journals_give_each_picture_once(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    whole = write(tmp_path / "whole.jsonl", [record(name) for name in NAMES])
    merged = merge([*paths, whole, paths[0]], tmp_path / "all.jsonl")
    assert [each["file"] for each in read(tmp_path / "all.jsonl")] == NAMES
    assert merged.repeated == 24 + sum(shard_of(name, 3) == 1 for name in NAMES)
    assert merged.differing == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (record("1", "A cat."), record("1", "A dog."), "A dog."),
        (record("1", "A cat."), record("1", None), "A cat."),
        (record("1", None), record("1", "A dog."), "A dog."),
        (record("1", "A cat."), record("1", None, sha256=None), "A cat."),  # a machine that could not read it
        (record("1", "A cat."), record("1", None, sha256="other"), None),  # it has changed since, and is torn now
        (record("1", "A cat."), record("1", "A dog.", sha256="other"), "A dog."),
    ],
)
def test_an_answer_counts_more_than_an_error_and_a_later_one_more_than_an_earlier_one(
    first: dict[str, Any], second: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    paths = [write(tmp_path / "1.jsonl", [first]), write(tmp_path / "2.jsonl", [second])]
    merged = merge(paths, tmp_path / "all.jsonl")
    (only,) = read(tmp_path / "all.jsonl")
    assert only.get("text") == expected
    assert merged.failed == (expected is None)
    assert merged.differing == (first.get("text") == "A cat." and second == record("1", "A dog."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "v" * 8}, "2.jsonl: line 2 has weights 'vvvvvvvv', but {0}/1.jsonl has 'wwwwwwww'; merge what"),
        (
            {"version": "0.0.1", "dtype": "float16"},
            "line 2 has dtype 'float16', but {0}/1.jsonl has 'float32' (and ver",
        ),
        ({"max_tokens": 9}, "line 2 has max_tokens 9, but {0}/1.jsonl has its default;"),
        ({"questions": {"text": "Why?"}}, "line 2 has questions {{'text': 'Why?'}}"),
    ],
)
def test_records_of_other_settings_weights_and_versions_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = write(tmp_path / "1.jsonl", [record("1")])
    second = write(tmp_path / "2.jsonl", [record("1"), record("1", settings={**TASK.settings, **settings})])
    output = tmp_path / "all.jsonl"
    with pytest.raises(ConfigError) as error:
        merge([first, second], output)
    assert message.format(tmp_path) in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl"]
    merge([first, second], output, mixed=True)
    assert len(read(output)) == (2 if set(settings) != {"version"} else 1)


def test_another_name_of_the_model_is_no_difference(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", [record("1")])
    second = write(tmp_path / "2.jsonl", [record("2", settings={**TASK.settings, "model": "/models/demo"})])
    assert merge([first, second], tmp_path / "all.jsonl").records == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("some text\n", "holds no records but something else"),
        ('{"a": 1}\n', "holds no records but something else"),
        ('{"fingerprint": "1", "file": "1"}\n', "line 1 is no record of `fastvlm caption`"),
        ('{"fingerprint": "1", "prediction": "1", "settings": {}}\n', "line 1 is no record of `fastvlm caption`"),
        ('{"fingerprint": "1", "shard": "9", "settings": {"a": 1}}\n', "names no shard in its first line"),
        ("", "there are no captions to merge"),
    ],
)
def test_what_is_no_journal_of_captions_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(content)
    with pytest.raises(ConfigError) as error:
        merge([tmp_path / "1.jsonl"], tmp_path / "all.jsonl")
    assert message in str(error.value)
    assert not (tmp_path / "all.jsonl").exists()


def test_an_output_that_is_something_else_stays_as_it_is(tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    output.write_text("my notes\n")
    with pytest.raises(ConfigError, match="holds no records but something else"):
        merge(shards(tmp_path), output)
    assert output.read_text() == "my notes\n"


def test_an_output_that_a_run_is_adding_to_is_refused(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    with Journal(paths[0]), pytest.raises(ConfigError, match="another run is writing this file"):
        merge(paths, paths[0])
    with Journal(paths[1]):
        merge(paths, paths[0])  # it may be adding to the others
    assert [each["file"] for each in read(paths[0])] == NAMES


def test_lines_that_are_no_records_are_counted_and_a_torn_one_of_a_running_job_is_not(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", [record("1")], '\n#!\n{"fingerprint": "2", "fi')
    second = write(tmp_path / "2.jsonl", [record("2")], "")
    merged = merge([first, second], tmp_path / "all.jsonl")
    assert dict(merged.damaged) == {str(first): 1}
    assert [each["file"] for each in read(tmp_path / "all.jsonl")] == ["1", "2"]


def test_a_later_run_goes_on_with_the_merged_journal(tmp_path: Path) -> None:
    merge(shards(tmp_path), tmp_path / "all.jsonl")
    with Journal(tmp_path / "all.jsonl") as journal:
        job = CaptionJob(TASK, journal)
        assert all(f"of {name}" in job._seen for name in NAMES)


def test_memory_does_not_grow_with_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_IN_MEMORY", 40)
    monkeypatch.setattr(sorting, "_RUNS", 4)
    monkeypatch.setattr(sorting, "_BUFFER", 1000)
    peaks = []
    for count in (200, 1600):
        names = [f"{number}.jpg" for number in range(count)]
        random.Random(0).shuffle(names)
        halves = names[: count // 2], names[count // 2 - 10 :]
        paths = [write(tmp_path / f"{n}.jsonl", [record(name) for name in half]) for n, half in enumerate(halves)]
        tracemalloc.start()
        merged = merge(paths, tmp_path / f"all-{count}.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (merged.records, merged.repeated) == (count, 10)
        assert [each["file"] for each in read(tmp_path / f"all-{count}.jsonl")] == [f"{n}.jpg" for n in range(count)]
    assert peaks[1] < peaks[0] + 50_000  # 1400 records have 0.5 MB
