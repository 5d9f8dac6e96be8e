"""`fastvlm caption` on the command line."""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fastvlm_mlx import Engine, FastVLM, FastVLMProcessor
from fastvlm_mlx.cli import captioning
from fastvlm_mlx.cli.app import app
from fastvlm_mlx.generation.stop import FirstSentence
from fastvlm_mlx.generation.words import count_words
from fastvlm_mlx.jobs.embedded import read_embedded
from fastvlm_mlx.jobs.xmp import read_xmp
from tests.checkpoints import APPLE


@pytest.fixture
def model(converted: Callable[..., Path]) -> str:
    return str(converted("apple"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures and a note, in the current folder's `photos`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("landscape", "portrait", "square"):
        shutil.copy(APPLE / "images" / f"{name}.png", photos / f"{name}.png")
    (photos / "README.md").write_text("not a picture")
    return photos


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["caption", *arguments], input=stdin)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_each_picture_goes_to_stdout_and_the_rest_to_stderr(model: str, folder: Path) -> None:
    result = run("photos", "-m", model, "-n", "5")
    assert result.exit_code == 0
    assert [record["file"] for record in lines(result.stdout)] == ["landscape.png", "portrait.png", "square.png"]
    assert set(lines(result.stdout)[0]) == {
        *("file", "text", "width", "height", "prompt_tokens", "generated_tokens", "finish_reason", "seconds", "sha256")
    }
    plan, summary = result.stderr.splitlines()[-2:]
    assert plan == "3 pictures, 3 to do, 1 skipped (not a picture)"
    assert summary.startswith("3 captioned in ")


def test_a_second_run_continues_the_file_of_the_first(model: str, folder: Path) -> None:
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    first = run("photos", "-m", model, "-n", "5", "-o", "out.jsonl")
    assert first.exit_code == 3
    assert "torn.jpg" in first.stderr
    assert first.stdout == ""
    again = run("photos", "-m", model, "-n", "5", "-o", "out.jsonl")
    assert again.exit_code == 3
    assert "4 pictures, 3 done, 1 failed before (--retry-errors tries them again), 0 to do" in again.stderr
    other = run("photos", "-m", model, "-n", "6", "-o", "out.jsonl")
    assert other.exit_code == 1
    assert "out.jsonl: holds captions with other settings (max_tokens)" in other.stderr


@pytest.mark.parametrize(("options", "dtype"), [((), "float32"), (("--dtype", "float16"), "float16")])
def test_the_file_says_what_the_model_computes_in(
    options: tuple[str, ...], dtype: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    class Watched(Engine):
        def __init__(self, model: FastVLM, processor: FastVLMProcessor, **more: Any) -> None:
            super().__init__(model, processor, **more)
            models.append(model)

    monkeypatch.setattr("fastvlm_mlx.generation.engine.Engine", Watched)
    assert run("photos", "-m", model, "-n", "1", "-o", "out.jsonl", *options).exit_code == 0
    assert [str(model.dtype) for model in models] == [f"mlx.core.{dtype}"]
    assert lines(Path("out.jsonl").read_text())[0]["settings"]["dtype"] == dtype


def test_captions_go_where_other_programs_look_for_them(model: str, folder: Path) -> None:
    (folder / "portrait.txt").write_text("My daughter in the garden.")
    wanted = ("--txt", "--xmp", "--csv", "table.csv", "--hf", "--webdataset", "set", "-o", "out.jsonl")
    result = run("photos", "-m", model, "-n", "5", *wanted)
    assert result.exit_code == 0
    assert "1 text not written: where somebody else's text is" in result.stderr
    text = {Path(str(record["file"])).stem: record["text"] for record in lines(Path("out.jsonl").read_text())}
    assert (folder / "landscape.txt").read_text() == f"{text['landscape']}\n"
    assert (folder / "portrait.txt").read_text() == "My daughter in the garden."
    assert "dc:description" in (folder / "square.png.xmp").read_text()
    with open("table.csv", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == list(text.values())
    assert [row["file_name"] for row in lines((folder / "metadata.jsonl").read_text())] == [
        f"{name}.png" for name in text
    ]
    with tarfile.open("set-000000.tar") as tar:
        assert len(tar.getnames()) == 9
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = run("photos", "-m", model, "-n", "5", *wanted)
    assert again.exit_code == 0
    assert "3 pictures, 3 done, 0 to do, 1 skipped (not a picture)" in again.stderr  # none of what is now beside them
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_captions_can_be_written_into_the_pictures_and_the_run_resumed(model: str, folder: Path) -> None:
    shutil.copy(folder / "square.png", folder / "copy.png")
    Image.open(folder / "square.png").convert("RGB").save(folder / "square.gif")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = ("photos", "-m", model, "-n", "5", "-o", "out.jsonl")
    result = run(*options, "--embed")
    assert result.exit_code == 3  # torn.jpg cannot be read
    assert "1 text not written: into pictures that are neither JPEG nor PNG nor WebP" in result.stderr
    records = {str(record["file"]): record for record in lines(Path("out.jsonl").read_text())}
    assert records["square.png"]["duplicate_of"] == "copy.png"
    for name in ("copy", "landscape", "portrait", "square"):
        data = (folder / f"{name}.png").read_bytes()
        record = records[f"{name}.png"]
        assert read_xmp(read_embedded(data)).description == record["text"]
        assert record["sha256"] == hashlib.sha256(before[f"{name}.png"]).hexdigest()
        assert record["embedded_sha256"] == hashlib.sha256(data).hexdigest()
    assert all((folder / name).read_bytes() == before[name] for name in ("square.gif", "torn.jpg", "README.md"))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    journal = Path("out.jsonl").read_bytes()
    again = run(*options, "--embed")
    assert "6 pictures, 5 done, 1 failed before" in again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == after
    assert Path("out.jsonl").read_bytes() == journal
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))  # as in a copy of the folder; the pictures are known by their content
    run(*options, "--embed")
    assert all("seconds" not in record for record in lines(Path("out.jsonl").read_text())[6:] if "text" in record)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == after


def test_captions_of_an_earlier_run_can_be_written_into_the_pictures(model: str, folder: Path) -> None:
    options = ("photos", "-m", model, "-n", "5", "-o", "out.jsonl")
    run(*options)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "3 pictures, 3 done, 0 to do" in run(*options).stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # only when it is spelled out
    assert run(*options, "--embed").exit_code == 0
    for record in lines(Path("out.jsonl").read_text()):
        data = (folder / str(record["file"])).read_bytes()
        assert read_xmp(read_embedded(data)).description == record["text"]
    for _ in range(2):
        assert "3 pictures, 3 done, 0 to do" in run(*options, "--embed").stderr
    assert len(Path("out.jsonl").read_bytes().splitlines()) == 6


def test_texts_that_cannot_be_written_make_the_exit_code_3(model: str, folder: Path) -> None:
    for name in ("landscape", "portrait", "square"):
        (folder / f"{name}.txt").mkdir()
        (folder / f"{name}.png.xmp").mkdir()
    result = run("photos", "-m", model, "-n", "2", "--txt", "--xmp", "-o", "out.jsonl")
    assert result.exit_code == 3
    assert result.stderr.count("not written: photos/") == 5
    assert result.stderr.endswith("not written: 1 more for such reasons\n")
    assert [record["file"] for record in lines(Path("out.jsonl").read_text())] == [
        *("landscape.png", "portrait.png", "square.png")
    ]


def test_answers_can_end_with_their_first_sentence(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("photos", "-m", model, "-n", "9", "-o", "out.jsonl")
    monkeypatch.setattr(FirstSentence, "add", lambda self, text: (text, True))
    assert run(*options, "--sentence").exit_code == 0
    records = lines(Path("out.jsonl").read_text())
    assert {(record["generated_tokens"], record["finish_reason"]) for record in records} == {(1, "stop")}
    assert "other settings (sentence)" in run(*options).stderr


def test_captions_can_begin_with_given_words_and_end_after_some(model: str, folder: Path) -> None:
    options = ("photos", "-m", model, "-n", "9", "-o", "out.jsonl")
    assert run(*options, "--prefix", " A photo of ", "--max-words", "4").exit_code == 0
    texts = [str(record["text"]) for record in lines(Path("out.jsonl").read_text())]
    assert all(text.startswith("A photo of") and count_words(text) <= 4 for text in texts)
    assert "other settings (max_words, prefix)" in run(*options).stderr


def test_captions_can_be_json(model: str, folder: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    Path("dogs.json").write_text('{"properties": {"dogs": {"type": "boolean"}}, "required": ["dogs"]}')
    options = ("photos", "-m", model, "--schema", "dogs.json")
    result = run(*options)
    assert result.exit_code == 0
    for record in lines(result.stdout):
        assert record["parsed"] == json.loads(str(record["text"]))
    assert run(*options, "-n", "2").exit_code == 3
    for given, message in (
        (("--sentence",), "--sentence: would change nothing with --schema: captions are JSON then"),
        (("--prefix", "A"), "--prefix: would change nothing with --schema"),
        (("--ask", "a=b"), "--schema: --ask alone gives no caption; add --prompt"),
        (("--schema", "no.json"), "--schema: no.json: no such file"),
    ):
        refused = run(*options, *given)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_the_command_for_one_picture_gives_the_same_text(model: str, folder: Path) -> None:
    options = ("-m", model, "-n", "9", "-p", "What is it?")
    records = lines(run("photos", *options, "--keep-openings").stdout)
    for record in records:
        alone = CliRunner().invoke(app, ["generate", str(folder / str(record["file"])), *options, "--no-warm"])
        assert record["text"] == alone.stdout.strip()


def test_progress_is_said_to_programs_as_json(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    options = ("photos", "-m", model, "-n", "2", "-o", "out.jsonl")
    for seconds, expected in ((1e9, [4]), (0.0, [1, 2, 3, 4, 4])):
        monkeypatch.setattr(captioning, "_JSON_SECONDS", seconds)
        result = run(*options, "--json-progress", "--force")
        said = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
        assert (result.stdout, [each["done"] for each in said]) == ("", expected)
        assert {**said[-1], "pictures_per_second": 0} == {
            **{"done": 4, "failed": 1, "total": 4, "pictures_per_second": 0, "seconds_left": 0.0}
        }
        assert said[-1]["pictures_per_second"] > 0
    done = [line for line in run(*options, "--json-progress").stderr.splitlines() if line.startswith("{")]
    assert [json.loads(line)["total"] for line in done] == [0]


def test_progress_is_noted_now_and_then_where_it_cannot_be_shown(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "_REPORT_SECONDS", 0.0)
    assert "2 of 3 pictures, " in run("photos", "-m", model, "-n", "2").stderr


def test_names_come_from_stdin_and_lists(model: str, folder: Path) -> None:
    piped = run("-", "-m", model, "-n", "2", stdin="photos/square.png\nphotos/portrait.png\n")
    assert [record["file"] for record in lines(piped.stdout)] == ["square.png", "portrait.png"]
    Path("list.txt").write_text("photos/square.png\nphotos/nowhere.png\n")
    listed = run("--filelist", "list.txt", "-m", model, "-n", "2")
    assert listed.exit_code == 3
    assert "photos/nowhere.png: no such file" in listed.stderr


def test_a_dry_run_says_what_is_to_do_and_writes_nothing(model: str, folder: Path) -> None:
    result = run("photos", "-m", model, "--dry-run", "-o", "out.jsonl", "--txt")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "3 pictures, 3 to do" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "landscape.png", "portrait.png", "square.png")
    ]
    assert not Path("out.jsonl").exists()


def test_a_dry_run_looks_into_the_file_of_a_run_that_goes_on(model: str, folder: Path) -> None:
    arguments = ("photos", "-m", model, "-n", "2", "-o", "out.jsonl")
    assert run(*arguments).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    with Path("out.jsonl").open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(len(whole) - 9)
        result = run(*arguments, "--dry-run")
        assert (result.exit_code, result.stderr) == (0, "3 pictures, 2 done, 1 to do, 1 skipped (not a picture)\n")
    assert Path("out.jsonl").read_bytes() == whole[:-9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give pictures or folders"),
        (("photos", "--force"), "--force: would change nothing without --output"),
        (("photos", "--xmp-name", "plain"), "--xmp-name: would change nothing without --xmp"),
        (("photos", "--overwrite"), "--overwrite: would change nothing without --txt, --xmp or --embed"),
        (("photos", "--ask", "colour"), "is not like colour="),
        (("photos", "--ask", "file=What?"), "file is taken"),
        (("photos", "--ask", "colour=What?", "--txt"), "--ask alone gives no caption"),
        (("photos", "--ask", "colour=What?", "--embed"), "--ask alone gives no caption"),
        (("photos", "-p", "About {what}"), "the prompt has {what}"),
        (("photos", "-o", "a", "--csv", "a"), "is --output"),
        (("photos", "--prefix", " "), "--prefix: is empty"),
        (("photos", "--prefix", "one two", "--max-words", "2"), "--prefix: has 2 of 2 words"),
        (("photos", "--prefix", "A", "--ask", "colour=What?"), "--ask alone gives no caption"),
        (("photos", "--prefix", "A", "--keep-openings"), "--keep-openings: would change nothing with --prefix"),
        (("photos", "--max-words", "0"), "--max-words"),
        (("--filelist", "\ud800"), "is not valid Unicode"),
    ],
)
def test_wrong_usage_is_found_before_any_work(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "-m", "nowhere/nothing")
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "there are no pictures"),
        (("photos", "-o", "missing/out.jsonl"), "missing/out.jsonl: cannot be written"),
        (("photos", "--csv", "photos"), "photos: cannot be written"),
        (("photos", "--webdataset", "."), ".: has no name that files could begin with"),
        (("--filelist", "missing.txt"), "missing.txt: cannot be read as a list of names"),
    ],
)
def test_what_cannot_work_is_found_before_the_model_is_looked_for(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments, "-m", "nowhere/nothing")
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_is_continued_without_loss_or_repetition(model: str, folder: Path, end: int) -> None:
    shutil.copy(APPLE / "images" / "tiny.png", folder / "tiny.png")
    for number in range(12):
        shutil.copy(folder / "tiny.png", folder / f"{number}.png")
        with (folder / f"{number}.png").open("ab") as file:
            file.write(str(number).encode())  # a picture of its own
    arguments = ("photos", "-m", model, "-n", "9", "--batch", "2", "-o", "out.jsonl")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "caption", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output = Path("out.jsonl")
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.send_signal(end)
    process.communicate()
    done = output.read_bytes()
    assert done.count(b"\n") >= 2  # an interrupt while a record is written withdraws it
    assert run(*arguments).exit_code == 0
    assert output.read_bytes().startswith(done[: done.rindex(b"\n") + 1])
    names = [record["file"] for record in lines(output.read_text())]
    assert len(names) == len(set(names)) == 16
