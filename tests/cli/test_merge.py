"""`fastvlm merge` on the command line."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli.app import app
from fastvlm_mlx.inputs.sources import read
from fastvlm_mlx.jobs.asking import Asking
from fastvlm_mlx.jobs.files import stat_of
from fastvlm_mlx.jobs.task import Task
from tests.checkpoints import APPLE

TASK = Task(questions={"text": "What is it?", "mood": "How?"}, model="demo", weights="w" * 8, dtype="float32")
NAMES = ("landscape.png", "portrait.png", "square.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures, and a journal for two and one for the third, which is a picture with a wrong end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in NAMES:
        shutil.copy(APPLE / "images" / name, tmp_path / "photos")
    for journal, names in (("1.jsonl", NAMES[:2]), ("2.jsonl", NAMES[2:])):
        lines = [record(tmp_path / "photos" / name) for name in names]
        (tmp_path / journal).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def record(path: Path) -> dict:
    work = Asking(TASK).look(path.name, str(path))
    outcome = {"text": f"A {path.stem}.", "answers": {"mood": "Calm"}, "width": 3, "finish_reason": "stop"}
    return {"fingerprint": work.key, **Asking(TASK).record(work, outcome)}


def merge(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["merge", *arguments])


def test_it_says_what_was_merged(folder: Path) -> None:
    result = merge("1.jsonl", "2.jsonl", "-o", "all.jsonl")
    assert result.exit_code == 0
    assert result.output == "3 pictures of 2 journals in all.jsonl\n"
    again = merge("2.jsonl", "1.jsonl", "all.jsonl", "-o", "all.jsonl")
    assert again.exit_code == 0
    assert "3 records about a picture that had one" in again.output


def test_what_is_missing_makes_the_exit_code_3(folder: Path) -> None:
    with (folder / "1.jsonl").open("a") as journal:
        plan = {"fingerprint": "s", "shard": "1/3", "pictures": 9, "of": 20, "settings": TASK.settings}
        journal.write(json.dumps(plan) + "\n#\n")
    result = merge("1.jsonl", "2.jsonl", "-o", "all.jsonl")
    assert result.exit_code == 3
    assert "1.jsonl: 1 line left out that is no record" in result.output
    assert "missing: shard 1/3 is not done" in result.output


def test_a_table_needs_no_pictures_and_no_model(folder: Path) -> None:
    assert merge("1.jsonl", "2.jsonl", "-o", "all.jsonl", "--csv", "t.csv").exit_code == 0
    rows = list(csv.DictReader((folder / "t.csv").read_text().splitlines()))
    assert [(row["file"], row["text"], row["mood"]) for row in rows] == [
        (name, f"A {Path(name).stem}.", "Calm") for name in NAMES
    ]


def test_texts_beside_pictures_are_those_of_the_same_content(folder: Path) -> None:
    shutil.copytree(folder / "photos", folder / "elsewhere")  # with other times
    shutil.copy(APPLE / "images" / "tiny.png", folder / "elsewhere" / "square.png")
    shutil.copy(APPLE / "images" / "tiny.png", folder / "elsewhere" / "new.png")
    result = merge("1.jsonl", "2.jsonl", "-o", "all.jsonl", "--pictures", "elsewhere", "--txt", "--hf")
    assert result.exit_code == 0
    assert (folder / "elsewhere" / "portrait.txt").read_text().strip() == "A portrait."
    assert not (folder / "elsewhere" / "square.txt").exists()
    assert "1 text not written: without a record" in result.output
    assert "1 text not written: that have changed since they were asked about" in result.output
    rows = [json.loads(line) for line in (folder / "elsewhere" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == list(NAMES[:2])


def test_a_caption_in_the_picture_itself_is_known_afterwards(folder: Path) -> None:
    arguments = ("1.jsonl", "-o", "all.jsonl", "--pictures", "photos/portrait.png", "--embed")
    assert merge(*arguments).exit_code == 0
    changed = read(str(folder / "photos" / "portrait.png")).data
    assert b"A portrait." in changed
    result = merge(*arguments)
    assert "changed" not in result.output
    lines = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    stats = [line["stat"] for line in lines if line["file"] == "portrait.png"]
    assert stats == [list(stat_of(str(folder / "photos" / "portrait.png")))]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("1.jsonl", "3.jsonl", "-o", "all.jsonl"), 1, "3.jsonl: no such file"),
        (("1.jsonl",), 2, "Missing option '--output'"),
        (("1.jsonl", "-o", "all.jsonl", "--txt"), 2, "--txt: needs the pictures; name their folder with --pictures"),
        (("1.jsonl", "-o", "all.jsonl", "--pictures", "photos"), 2, "--pictures: would change nothing without --txt"),
        (("1.jsonl", "-o", "all.jsonl", "--csv", "1.jsonl"), 2, "--csv: is a journal"),
        (("1.jsonl", "-o", "nowhere/all.jsonl"), 1, "nowhere/all.jsonl: cannot be written"),
        (("1.jsonl", "-o", "all.jsonl", "--overwrite"), 2, "--overwrite: would change nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple[str, ...], code: int, message: str, folder: Path) -> None:
    result = merge(*arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not (folder / "all.jsonl").exists()
