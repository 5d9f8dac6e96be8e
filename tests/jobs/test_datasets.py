import csv
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.datasets import WebDataset, write_csv, write_metadata

ROWS: list[dict[str, Any]] = [
    {"file_name": "a.jpg", "text": 'A "dog",\nin two lines', "tokens": 3},
    {"file_name": "caf\udce9.jpg", "text": "caf\u00e9"},
]


def test_a_table_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    for _ in range(2):
        write_csv(path, ["file_name", "text"], ROWS)
        with path.open(encoding="utf-8", newline="") as file:
            assert list(csv.DictReader(file)) == [
                {"file_name": "a.jpg", "text": 'A "dog",\nin two lines'},
                {"file_name": "caf\\udce9.jpg", "text": "caf\u00e9"},
            ]
    path.write_text("file_name,caption\n")
    with pytest.raises(ConfigError, match=r"\.csv: exists, and is not a table with these columns; name another"):
        write_csv(path, ["file_name", "text"], ROWS)
    assert path.read_text() == "file_name,caption\n"
    path.write_text("")
    write_csv(path, ["file_name"], [])
    assert path.read_text() == "file_name\n"


def test_a_table_that_cannot_be_finished_does_not_replace_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    write_csv(path, ["text"], [{"text": "old"}])

    def rows() -> Any:
        yield {"text": "new"}
        raise FileNotFoundError(2, "No such file or directory", "photo.jpg")

    with pytest.raises(FileNotFoundError):
        write_csv(path, ["text"], rows())
    assert path.read_text() == "text\nold\n"
    assert os.listdir(tmp_path) == ["captions.csv"]


def test_metadata_keeps_the_rows_of_others_and_replaces_ours(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    assert write_metadata(tmp_path, ROWS) == 1  # a name that is not UTF-8 could not be found by anybody
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{**ROWS[0], "generator": "fastvlm-mlx"}]
    theirs = '{"text":"my\u2028dog",  "file_name": "b.jpg", "label": 3}'
    path.write_text(f"{path.read_text()}\n{theirs}")
    rows = [{"file_name": name, "text": "A cat."} for name in ("b.jpg", "c.jpg")]
    assert write_metadata(tmp_path, rows) == 1
    ours = {"file_name": "c.jpg", "text": "A cat.", "generator": "fastvlm-mlx"}
    assert path.read_text(encoding="utf-8") == f"{theirs}\n{json.dumps(ours)}\n"
    for content, reason in (("{}\n[1]\n", "line 2 is no JSON object"), ("file_name,text\n", "line 1 is not")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=rf"metadata\.jsonl: {reason}.*; it is left as it is"):
            write_metadata(tmp_path, rows)
        assert path.read_text() == content


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.v2.JPG", "b.png", "noextension"):
        (folder / name).write_bytes(name.encode() * 100)
    return [str(folder / name) for name in ("a.v2.JPG", "b.png", "noextension")]


def written(prefix: Path, pictures: list[str], **options: int) -> None:
    with WebDataset(prefix, **options) as dataset:
        for picture in pictures:
            dataset.add(picture, {"text": "caf\u00e9", "file": os.path.basename(picture)})


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_a_sample_is_picture_text_and_record_with_one_key(tmp_path: Path, pictures: list[str]) -> None:
    written(tmp_path / "captions", pictures)
    found = members(tmp_path / "captions-000000.tar")
    kinds = (("JPG".lower(), "txt", "json"), ("png", "txt", "json"), ("img", "txt", "json"))
    assert list(found) == [f"{number:09}.{kind}" for number, three in enumerate(kinds) for kind in three]
    assert found["000000000.jpg"] == Path(pictures[0]).read_bytes()
    assert found["000000000.txt"].decode() == "caf\u00e9"
    assert json.loads(found["000000001.json"]) == {"text": "caf\u00e9", "file": "b.png"}
    first = (tmp_path / "captions-000000.tar").read_bytes()
    written(tmp_path / "captions", pictures)
    assert (tmp_path / "captions-000000.tar").read_bytes() == first


def test_shards_are_split_and_those_of_an_earlier_longer_run_removed(tmp_path: Path, pictures: list[str]) -> None:
    written(tmp_path / "c", pictures, shard_bytes=5000)
    shards = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert shards == ["c-000000.tar", "c-000001.tar", "c-000002.tar"]
    assert list(members(tmp_path / "c-000001.tar")) == ["000000001.png", "000000001.txt", "000000001.json"]
    written(tmp_path / "c", pictures[:1])
    assert [path.name for path in tmp_path.glob("*.tar")] == ["c-000000.tar"]


def test_a_tar_file_of_others_is_not_replaced(tmp_path: Path, pictures: list[str]) -> None:
    path = tmp_path / "c-000000.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(pictures[0])
    for content in (path.read_bytes(), b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"c-000000\.tar: exists, and is not a data set of captions"):
            WebDataset(tmp_path / "c")
        assert path.read_bytes() == content


def test_a_data_set_that_is_interrupted_leaves_the_earlier_one(tmp_path: Path, pictures: list[str]) -> None:
    written(tmp_path / "c", pictures)
    before = (tmp_path / "c-000000.tar").read_bytes()
    with pytest.raises(FileNotFoundError, match="gone"):
        written(tmp_path / "c", [*pictures[:1], str(tmp_path / "gone.jpg")])
    assert (tmp_path / "c-000000.tar").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-000000.tar", "pictures"]
