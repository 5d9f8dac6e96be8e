"""Outputs beside the journal of captions."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.asking import Record
from fastvlm_mlx.jobs.exports import Exporter, Exports
from fastvlm_mlx.jobs.pictures import Picture, find_pictures


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Picture]:
    """Three files with the names of pictures, in the current folder's `photos`."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in "abc":
        Path(f"photos/{name}.jpg").write_bytes(b"pixels")
    return find_pictures(["photos"]).found


def exporter(pictures: list[Picture], exports: Exports) -> Exporter:
    return Exporter(exports, pictures, fields=["text", "colour"], generator="test")


def record(picture: Picture) -> Record:
    return {"file": picture.name, "text": f"Text of {picture.name}.", "answers": {"colour": "red"}}


def test_a_text_that_cannot_be_written_is_named_and_the_others_are_written(pictures: list[Picture]) -> None:
    Path("photos/b.txt").mkdir()
    writer = exporter(pictures, Exports(txt=True))
    for picture in pictures:
        writer.write_beside(picture, record(picture))
    assert writer.failures == ["photos/b.txt: cannot be read (Is a directory)"]
    assert Path("photos/c.txt").read_text() == "Text of c.jpg.\n"


@pytest.mark.parametrize(
    ("prepare", "exports", "message"),
    [
        (lambda: Path("t.csv").write_text("name,price\n"), Exports(csv=Path("t.csv")), "not a table with these"),
        (lambda: Path("t.csv").mkdir(), Exports(csv=Path("t.csv")), "cannot be written"),
        (lambda: Path("photos/metadata.jsonl").write_text("?"), Exports(hf=True), "line 1 is not valid JSON"),
        (lambda: Path("photos/metadata.jsonl").mkdir(), Exports(hf=True), "cannot be written"),
        (lambda: Path("s-000000.tar").write_text("?"), Exports(webdataset=Path("s")), "is not a data set of captions"),
        (lambda: Path("s").write_text(""), Exports(webdataset=Path("s/s")), "cannot be written"),
    ],
)
def test_outputs_that_cannot_be_written_are_found_before_the_work(
    pictures: list[Picture], prepare: Callable[[], object], exports: Exports, message: str
) -> None:
    prepare()
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError, match=message):
        exporter(pictures, exports).check()
    assert sorted(Path().rglob("*")) == before


def test_a_check_that_finds_nothing_changes_nothing(pictures: list[Picture]) -> None:
    before = sorted(Path().rglob("*"))
    writer = exporter(pictures, Exports(csv=Path("t.csv"), hf=True, webdataset=Path("set")))
    writer.check()
    assert sorted(Path().rglob("*")) == before
    writer.write_data_sets(record)
    writer.check()
    with open("t.csv", encoding="utf-8") as file:
        assert [row["colour"] for row in csv.DictReader(file)] == ["red"] * 3
    rows = [json.loads(line) for line in Path("photos/metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["Text of a.jpg.", "Text of b.jpg.", "Text of c.jpg."]


def test_nothing_is_written_into_a_photos_library(pictures: list[Picture]) -> None:
    originals = Path("My.photoslibrary/originals/A")
    originals.mkdir(parents=True)
    (originals / "x.jpg").write_bytes(b"pixels")
    for named in ("My.photoslibrary", str(originals), str(originals / "x.jpg")):
        found = find_pictures([named]).found
        writer = exporter(found, Exports(txt=True, xmp=True, hf=True))
        writer.check()
        writer.write_beside(found[0], record(found[0]))
        writer.write_data_sets(record)
        assert [path.name for path in Path("My.photoslibrary").rglob("*") if path.is_file()] == ["x.jpg"]
        assert writer.left_out == {"in a Photos library or on the web": 2}
