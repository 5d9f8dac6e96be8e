"""An archive is read within bounds, and only if it is what it says it is."""

import shutil
import warnings
import zipfile
from pathlib import Path

import pytest

from fastvlm_mlx.convert import convert_checkpoint, plan
from fastvlm_mlx.convert.source import archive
from fastvlm_mlx.errors import CheckpointError
from tests.checkpoints import SOURCES

APPLE = SOURCES["apple"]


def zip_of(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that appear twice
        with zipfile.ZipFile(path, "w", compression) as written:
            for name, data in members:
                written.writestr(name, data)
    return path


def test_an_archive_unpacks_to_no_more_than_weights_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one file of zeros, nor many files whose sum is too large."""
    monkeypatch.setattr(archive, "_LARGEST_UNPACKED", 2_000_000)
    config = ("config.json", b"{}")
    large = zip_of(tmp_path / "large.zip", [config, ("model.safetensors", bytes(2_100_000))])
    many = zip_of(tmp_path / "many.zip", [config, *((f"{number}.json", bytes(300_000)) for number in range(7))])
    for path in (large, many):
        with pytest.raises(CheckpointError, match=r"has \S+ kB and would unpack to 2\.10 MB; weights do not compress"):
            plan(path)


def test_an_archive_with_thousands_of_files_is_none_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MOST_MEMBERS", 100)
    path = zip_of(tmp_path / "it.zip", [(f"{number}.json", b"") for number in range(101)])
    with pytest.raises(CheckpointError, match="holds 101 files, more than a checkpoint has"):
        plan(path)


def test_an_archive_with_two_files_of_one_name_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "it.zip", [("a/config.json", b"{}"), ("a/config.json", b"[]")])
    with pytest.raises(CheckpointError, match=r"it holds two files called a/config\.json"):
        plan(path)


def test_an_encrypted_archive_is_said_to_be_encrypted(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "it.zip", [("config.json", b"{}"), ("model.safetensors", b"x" * 99)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot be unpacked: model\.safetensors is encrypted"):
        plan(path)


def test_a_zip_that_would_not_fit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zip_of(tmp_path / "it.zip", [(file.name, file.read_bytes()) for file in APPLE.iterdir()])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(CheckpointError, match=r"unpacks to .* MB, more than .* has left"):
        plan(tmp_path / "it.zip")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_weight_that_differs_from_the_archives_checksum_is_not_converted(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "it.zip"
    with zipfile.ZipFile(path, "w", compression, compresslevel=0) as written:
        for file in APPLE.iterdir():
            written.write(file, file.name)
    data, weights = bytearray(path.read_bytes()), (APPLE / "model.safetensors").read_bytes()
    place = data.find(weights[-200:])
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged: .*(checksum in the archive|Bad CRC-32)"):
        convert_checkpoint(path, tmp_path / "out", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["it.zip"]
