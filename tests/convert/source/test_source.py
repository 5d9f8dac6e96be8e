"""Folders, archives and Hub repositories are opened read-only and completely."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastvlm_mlx.convert.source.source import open_source
from tests.checkpoints import SOURCES, tensors

APPLE = SOURCES["apple"]


def snapshot(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def archived(target: Path, compression: int, inside: str = "llava-fastvithd_0.5b_stage3/") -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        archive.writestr("__MACOSX/llava/config.json", "{}")
        archive.writestr(f"{inside}checkpoint-10/config.json", "{}")
        for path in sorted(APPLE.iterdir()):
            archive.write(path, inside + path.name)
    return target


def test_a_tensor_is_read_as_it_is_stored_whole_or_by_rows() -> None:
    expected = tensors(APPLE)
    with open_source(APPLE) as source:
        assert set(source.tensors) == set(expected)
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(tensor.read(), expected[name])
        rows = source.tensors["model.embed_tokens.weight"].read(5, 3)
    np.testing.assert_array_equal(rows, expected["model.embed_tokens.weight"][5:8])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("inside", ["", "llava-fastvithd_0.5b_stage3/"])
def test_an_archive_holds_what_its_folder_holds(tmp_path: Path, compression: int, inside: str) -> None:
    archive = archived(tmp_path / "it.zip", compression, inside)
    expected = tensors(APPLE)
    with open_source(archive) as source:
        scratch = source.folder
        assert source.json("config.json") == json.loads((APPLE / "config.json").read_text())
        assert (scratch / "model.safetensors").exists() == (compression == zipfile.ZIP_DEFLATED)
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(tensor.read(), expected[name])
    assert not scratch.exists()


def test_shards_make_one_checkpoint(tmp_path: Path) -> None:
    values = tensors(APPLE)
    names = sorted(values)
    placement = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(placement.values())):
        save_file({name: values[name] for name in names if placement[name] == file}, tmp_path / file)
    save_file({"unrelated": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placement}))
    with open_source(tmp_path) as source:
        assert set(source.tensors) == set(values)
        digest = source.sha256(lambda _: None)
    listing = "".join(
        f"{hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()}  {file}\n"
        for file in sorted(set(placement.values()))
    )
    assert digest == hashlib.sha256(listing.encode()).hexdigest()


def test_the_digest_of_one_file_is_its_sha256() -> None:
    with open_source(APPLE) as source:
        counts: list[int] = []
        digest = source.sha256(counts.append)
        assert sum(counts) == source.nbytes
    assert digest == hashlib.sha256((APPLE / "model.safetensors").read_bytes()).hexdigest()


def test_opening_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(APPLE, folder)
    before = snapshot(tmp_path)
    with open_source(folder) as source:
        source.sha256(lambda _: None)
    assert snapshot(tmp_path) == before
