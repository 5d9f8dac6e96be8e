"""A folder is written as a whole by one of several processes, and what killed ones left is removed."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastvlm_mlx.convert import convert_checkpoint, pipeline
from fastvlm_mlx.convert.quantize import checkpoint
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.convert.write import destination
from fastvlm_mlx.convert.write.destination import check_alone, partial_folder, vacant
from fastvlm_mlx.errors import ConversionError
from tests.checkpoints import SOURCES

COMMAND = [sys.executable, "-m", "fastvlm_mlx"]
HANGING = """
import sys, time
from pathlib import Path
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.convert.write.destination import partial_folder

target = Path(sys.argv[1])
with partial_folder(target, 0) as folder, scratch_folder(target.parent, "other") as scratch:
    (folder / "model.safetensors").write_bytes(b"half")
    (scratch / "model.safetensors").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(target: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is in the middle of writing `target`."""
    with subprocess.Popen([sys.executable, "-c", HANGING, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] or path.name for path in folder.iterdir())


def write(target: Path) -> None:
    with partial_folder(vacant(target), 0) as folder:
        (folder / "config.json").write_text("{}")


def test_work_in_progress_is_kept_and_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    notes = tmp_path / ".out.partial-notes"
    notes.mkdir()
    (notes / "mine").write_text("data")
    with writing(tmp_path / "out") as process:
        write(tmp_path / "else")
        assert names(tmp_path) == [".other.partial", ".out.partial", ".out.partial", "else"]
        with pytest.raises(ConversionError, match="out: another process is writing it; wait for it or choose another"):
            check_alone(tmp_path / "out")
        process.kill()
        process.wait()
        assert names(tmp_path) == [".other.partial", ".out.partial", ".out.partial", "else"]
        write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [notes.name, "else", "out"]
    assert [path.name for path in notes.iterdir()] == ["mine"]


@pytest.mark.parametrize(("days", "left"), [(0.9, True), (1.1, False)])
def test_a_leftover_of_another_machine_is_removed_after_a_day(days: float, left: bool, tmp_path: Path) -> None:
    """Its lock cannot be seen from here where a network's file system keeps locks to each machine."""
    folder = tmp_path / ".out.partial-elsewhere"
    folder.mkdir()
    (folder / ".fastvlm-lock").write_text("another machine")
    moment = folder.stat().st_mtime - days * 86400
    os.utime(folder, (moment, moment))
    write(tmp_path / "out")
    assert folder.exists() == left


def test_names_of_scratch_folders_do_not_repeat(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "out") as first, scratch_folder(tmp_path, "out") as second:
        assert first != second
        assert first.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["-q"]], ids=["convert", "convert -q"])
def test_of_two_that_convert_to_one_folder_one_is_told_that_it_exists(options: list[str], tmp_path: Path) -> None:
    command = [*COMMAND, "convert", str(SOURCES["apple"]), str(tmp_path / "out"), *options]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=180)[1] for child in children]
    refused, written = sorted(said, key=lambda text: "wrote" in text)
    assert sorted(child.returncode for child in children) == [0, 1]
    assert written.startswith(f"wrote {tmp_path / 'out'}")
    assert any(refused.startswith(f"error: {tmp_path / 'out'}: {why}") for why in ("exists already", "another process"))
    assert refused.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "link", "current folder"])
def test_an_empty_folder_that_cannot_be_replaced_is_filled(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    before = real.stat().st_ino
    convert_checkpoint(SOURCES["apple"], {"folder": real, "link": tmp_path / "link", "current folder": "."}[kind])
    assert real.stat().st_ino == before
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in real.iterdir()}
    assert not [path for path in real.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_steps_on_the_way_to_a_folder_are_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that exists may be a mount point, and what is above it a disk without room or permission."""
    mount = tmp_path / "mount"
    mount.mkdir()
    places: list[Path] = []

    @contextmanager
    def noted(parent: Path, name: str) -> Iterator[Path]:
        places.append(parent)
        with scratch_folder(parent, name) as folder:
            yield folder

    monkeypatch.setattr(destination, "scratch_folder", noted)
    pipeline.convert_and_quantize(SOURCES["apple"], mount, quantization=Quantization(preset="int8"))
    *steps, last = places
    assert {steps[0], last} == {mount}
    assert {path.name for path in mount.iterdir()} >= {"config.json", "model.safetensors", "quantization_report.json"}
    assert not [path for path in mount.iterdir() if path.name.startswith(".")]


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(destination, "scratch_folder", read_only)
    with pytest.raises(ConversionError, match=r"out: cannot be written: Read-only file system$"):
        pipeline.convert_and_quantize(SOURCES["apple"], tmp_path / "out")


def test_what_quantizing_needs_is_the_size_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = tmp_path / "exact"
    convert_checkpoint(SOURCES["apple"], exact, dtype="float32")
    before = (exact / "model.safetensors").stat().st_size
    asked: list[int] = []

    @contextmanager
    def noted(target: Path, needed: int) -> Iterator[Path]:
        asked.append(needed)
        with partial_folder(target, needed) as folder:
            yield folder

    monkeypatch.setattr(checkpoint, "partial_folder", noted)
    checkpoint.quantize_checkpoint(exact, tmp_path / "int4", quantization=Quantization(preset="int4"))
    after = (tmp_path / "int4" / "model.safetensors").stat().st_size
    assert asked[0] < before
    assert 0.9 * after < asked[0] <= after  # the file has a header, too


def test_what_appears_in_an_empty_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with partial_folder(tmp_path, 0) as folder:
            (folder / "config.json").write_text("{}")
            (tmp_path / "precious").write_text("data")

    with pytest.raises(ConversionError, match="exists already: it was written by another process"):
        write_while_another_does()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_home_folder_in_quotes_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vacant("~/out") == tmp_path / "out"
    assert vacant("~nobody-of-this-name/out") == Path("~nobody-of-this-name/out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_a_conversion_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Also where the tests run with signals ignored, as after `nohup`: the conversion begins with the default ones."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastvlm_mlx.convert.write.shards import ShardWriter
def hang(*_):
    os.write(1, b"ready\\n")
    time.sleep(600)
ShardWriter.write = hang
from fastvlm_mlx.cli import main
main()
"""
    command = [sys.executable, "-c", code, "convert", str(SOURCES["apple"]), str(tmp_path / "out"), "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not list(tmp_path.iterdir())
