"""The driver notices every kind of fault, and names the case."""

import os
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest

from fastvlm_mlx import ImageError
from tests.checkpoints import APPLE
from tests.fuzz import classes, damage, driver
from tests.fuzz.room import Room
from tests.fuzz.subject import FastVLMError, Refused

_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    case = line.strip()
    if case == "crash:1":
        os.abort()
    if case == "hang:1":
        time.sleep(60)
    print(json.dumps({"case": case, "kind": "answered"}), flush=True)
"""


def test_a_crash_and_a_hang_are_named_and_the_next_cases_run() -> None:
    names = ["good:1", "crash:1", "good:2", "hang:1", "good:3"]
    outcomes = driver.run(names, program=("-c", _WORKER), patience=1.0)
    assert [(outcome.case, outcome.kind) for outcome in outcomes] == [
        *(("good:1", "answered"), ("crash:1", "crash"), ("good:2", "answered")),
        *(("hang:1", "hang"), ("good:3", "answered")),
    ]


def _leave(_: Random, room: Room) -> None:
    (room.temporary / "left").write_text("x")


def _change(_: Random, room: Room) -> None:
    path = room.input / "source"
    path.write_text("x")
    room.watch(path)
    path.write_text("y")


def _print(_: Random, room: Room) -> None:
    os.write(2, b"library: warning\n")


def _half(_: Random, room: Room) -> None:
    (room.cache / "model").mkdir()


class _Raw(ImageError):
    """An error whose message is as it was given."""

    def __str__(self) -> str:
        return str(self.args[0])


def _raise(error: BaseException) -> classes.Case:
    def case(_: Random, room: Room) -> None:
        raise error

    return case


FAULTS: dict[str, tuple[classes.Case, str, str]] = {
    "an answer": (lambda random, room: None, "answered", ""),
    "a refusal": (_raise(ImageError("x.png: no such file")), "refused", "ImageError: x.png: no such file"),
    "a refused command": (_raise(Refused("error: x")), "refused", "error: x"),
    "another exception": (_raise(KeyError("x")), "exception", "KeyError at "),
    "a panic": (_raise(SystemError("x")), "exception", "SystemError at "),
    "the base class": (_raise(FastVLMError("x")), "message", "not a child of FastVLMError"),
    "two lines": (_raise(_Raw("a\nb")), "message", "not one printable line"),
    "an escape": (_raise(_Raw("a\x1b[2J")), "message", "not one printable line"),
    "a long message": (_raise(_Raw("a" * 2000)), "message", "2000 characters"),
    "no message": (_raise(ImageError("")), "message", "it is empty"),
    "a leftover": (_leave, "left", "temporary/left"),
    "half an entry of the cache": (_half, "left", "model in the cache, incomplete"),
    "a changed source": (_change, "changed", "source"),
    "noise": (_print, "noise", "library: warning"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, kind, detail = FAULTS[name]
    monkeypatch.setitem(classes.CLASSES, "case", case)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    for variable in ("FASTVLM_CACHE", "HOME", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "")
    log, stderr = tmp_path / "stderr", os.dup(2)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        try:
            outcome = driver.judge("case:1", Room(tmp_path), file)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    assert (outcome.kind, outcome.case) == (kind, "case:1")
    assert detail in outcome.detail


def test_the_seeds_of_a_class_do_not_depend_on_how_many_are_tried() -> None:
    few, many = driver.cases(200, 3), driver.cases(5000, 3)
    assert {name.partition(":")[0] for name in few} == set(driver.SHARES) == set(classes.CLASSES)
    assert set(few) <= set(many)
    assert len(set(many)) == len(many) >= 5000


def test_damage_depends_on_the_seed_alone_whatever_came_before() -> None:
    data = (APPLE / "reparam" / "config.json").read_bytes()
    first = [damage.some_json(Random(seed), data) for seed in range(300)]
    assert [damage.some_json(Random(seed), data) for seed in range(300)] == first


def test_the_command_line_runs_one_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["driver", "--case", "array:1"])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == 0
    assert "array:1: " in capsys.readouterr().out
