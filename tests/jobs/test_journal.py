import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.journal import Journal


def written(path: Path, *fingerprints: str) -> Path:
    with Journal(path) as journal:
        for fingerprint in fingerprints:
            journal.add(fingerprint, {"text": f"text of {fingerprint}"})
    return path


def found(path: Path, *, own: bool = False) -> tuple[list[str], list[str]]:
    """The fingerprints in a file, in order, and the notes about it."""
    notes: list[str] = []
    with Journal(path, own=own, notify=notes.append) as journal:
        return [record["fingerprint"] for record in journal], notes


def test_records_are_found_again_and_the_last_one_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl", "a", "b")
    with Journal(path) as journal:
        assert journal.get("a") == {"fingerprint": "a", "text": "text of a"}
        assert (len(journal), "b" in journal, "c" in journal, journal.get("c")) == (2, True, False, None)
        journal.add("a", {"text": "später\u2028\udcff"})
    with Journal(path) as journal:
        assert [record["text"] for record in journal] == ["text of b", "später\u2028\udcff"]
    assert len(path.read_bytes().decode().split("\n")) == 4  # UTF-8, three lines, each with its end


@pytest.mark.parametrize("own", [True, False])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, own: bool) -> None:
    whole = written(tmp_path / "whole", "a", "b").read_bytes()
    first = whole.index(b"\n") + 1
    path = tmp_path / "journal.jsonl"
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = [name for name, end in (("a", first), ("b", len(whole))) if size >= end - 1]
        assert found(path, own=own)[0] == complete, size
        assert path.read_bytes() == whole[: {0: 0, 1: first, 2: len(whole)}[len(complete)]]


DAMAGE = {
    "zeros": b"\0\0\0\0",
    "two run together": b'{"fingerprint": "x", "te{"fingerprint": "y", "text": ""}',
    "no fingerprint": b'{"key": "abc", "prediction": "3"}',
    "not UTF-8": b"\xff\xfe",
    "another kind of JSON": b"[" * 20_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_left_out_with_a_note_and_removed_from_own_files(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path / "journal.jsonl", "a", "b", "c")
    first, _, third = path.read_bytes().splitlines()
    content = b"\n".join([first, damage, third, b""])
    path.write_bytes(content)
    for _ in range(2):
        fingerprints, (note,) = found(path)
        assert fingerprints == ["a", "c"]
        assert note.startswith(f"{path}: 1 damaged line left out (line 2: ")
        assert path.read_bytes() == content
    fingerprints, (note,) = found(path, own=True)
    assert fingerprints == ["a", "c"]
    assert "1 damaged line removed" in note
    assert found(path, own=True) == (["a", "c"], [])
    assert found(written(path, "d")) == (["a", "c", "d"], [])


@pytest.mark.parametrize("content", [b"Dear diary\n", b'{"a": 1}', b'{"a', b"\0\0", b"x" * 70_000, b"x\n" * 5000])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"diary\.txt: holds no records of earlier runs but something else \(line 1"):
        Journal(path)
    assert path.read_bytes() == content
    assert found(path, own=True)[0] == []
    assert path.read_bytes() == b""


def test_what_has_no_end_and_no_beginning_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: is not a regular file"):
        Journal(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        Journal(tmp_path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        with pytest.raises(ConfigError, match="another run is writing this file; wait until it has ended, or name"):
            Journal(path)
        journal.add("a", {})
    assert found(path) == (["a"], [])


def test_a_file_that_was_removed_or_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "journal.jsonl", "a", "b")
    with Journal(path) as journal:
        with path.open("r+b") as other:
            other.write(b" " * 30)
        with pytest.raises(ConfigError, match="was changed by another program"):
            journal.get("a")
        path.unlink()
        with pytest.raises(ConfigError, match="was removed or replaced while records were added"):
            journal.add("c", {})


def test_a_full_disk_leaves_no_part_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "journal.jsonl", "a")
    before, write = path.read_bytes(), os.write
    room = [20]

    def limited(file: int, data: bytes) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return write(file, data[: room.pop()])

    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", limited)
        with pytest.raises(OSError, match="No space left on device") as raised:
            journal.add("b", {"text": "long"})
        assert raised.value.filename == str(path)
        assert path.read_bytes() == before
        monkeypatch.undo()
        journal.add("b", {"text": "long"})
    assert found(path) == (["a", "b"], [])


# Adds numbered records after those that are there, reports each when it has been added, and is killed at some moment:
# in every other round while it opens the file, otherwise after the first record.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from fastvlm_mlx.jobs.journal import Journal

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
acknowledged = 0
for round in range(rounds):
    out, into = os.pipe()
    child = os.fork()
    if not child:
        with Journal(path) as journal:
            for number in range(len(journal), 10**6):
                journal.add(str(number), {"text": "x" * random.choice((10, 1_000, 30_000))})
                os.write(into, b"x")
    os.close(into)
    acknowledged += len(os.read(out, 1)) if round % 2 else 0
    time.sleep(random.uniform(0, 0.002))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged += len(os.read(out, 10**6))
    os.close(out)
print(acknowledged)
"""


def test_killed_at_any_moment_it_loses_doubles_and_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, path, "20"], check=True, capture_output=True, text=True, timeout=60
    )
    fingerprints, _ = found(path)
    assert len(fingerprints) >= int(done.stdout) >= 10
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line)["fingerprint"] for line in lines[:-1]] == [str(i) for i in range(len(fingerprints))]
    assert lines[-1] == b""


def test_memory_holds_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    line = json.dumps({"fingerprint": "{}", "text": "word " * 400})
    with path.open("w") as file:
        file.writelines(line.replace("{}", f"{number:032}", 1) + "\n" for number in range(5000))  # 10 MB
    tracemalloc.start()
    with Journal(path) as journal:
        held = tracemalloc.get_traced_memory()[0]
        assert len(journal) == 5000
    tracemalloc.stop()
    assert held < 400 * 5000  # fingerprint, two numbers and an entry of a dict


def test_without_locks_it_works_and_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    path = written(tmp_path / "journal.jsonl", "a")
    with Journal(path) as first, Journal(path) as second:
        first.add("b", {})
        second.add("c", {})
        first.add("d", {})
        assert [record["fingerprint"] for record in first] == ["a", "b", "d"]
    assert found(path) == (["a", "b", "c", "d"], [])
