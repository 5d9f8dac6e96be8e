"""The safetensors library judges every file, in a folder or in an archive; our messages say what it found."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastvlm_mlx.checkpoint.folder import is_complete, read_weights
from fastvlm_mlx.checkpoint.released import full_size
from fastvlm_mlx.checkpoint.safetensors import TensorFile, read_header
from fastvlm_mlx.convert.source.archive import open_archive
from fastvlm_mlx.errors import CheckpointError

Entries = dict[str, Any]


def entry(dtype: Any, shape: Any, offsets: Any) -> Entries:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file(header: Entries | list[Any] | bytes, data: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


WHOLE = entry("F32", [16], [0, 64])
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes is too short"),
    "seven bytes": (b"1234567", "7 bytes is too short"),
    "zip": (b"PK" * 99, r"not a safetensors file \(its header claims"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "no JSON": (file(b"{" * 20), "header is damaged"),
    "too deep": (file(b'{"a":' + b"[" * 100_000), "header is damaged"),
    "not UTF-8": (file(b'{"\xff":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}'), "header is damaged"),
    "infinite": (file(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,64]}}'), "header is damaged"),
    "5000 digits": (file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,64]}}'), "is damaged"),
    "list": (file([1]), "header is damaged: must hold a JSON object, not a list"),
    "entry of text": (file({"a": "F32"}), "entry of tensor a is damaged"),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 64]}}), "entry of tensor a is damaged"),
    "no offsets": (file({"a": {"dtype": "F32", "shape": [16]}}), "entry of tensor a is damaged"),
    "one offset": (file({"a": entry("F32", [16], [0])}), "entry of tensor a is damaged"),
    "offsets as text": (file({"a": entry("F32", [16], ["0", "64"])}), "entry of tensor a is damaged"),
    "negative": (file({"a": entry("F32", [16], [-1, 63])}), "entry of tensor a is damaged"),
    "dtype a list": (file({"a": entry([], [16], [0, 64])}), "entry of tensor a is damaged"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}, "a": WHOLE}), "header is damaged"),
    "overflow": (file({"a": entry("F32", [2**40, 2**40], [0, 64])}), "entry of tensor a is damaged"),
    "unknown dtype": (file({"a": entry("X9", [16], [0, 64])}), "tensor a has the unsupported dtype X9"),
    "shape": (file({"a": entry("F32", [15], [0, 64])}), r"a is 64 bytes long, but F32 \[15\] takes 60"),
    "overlap": (file({"a": WHOLE, "b": entry("F32", [8], [32, 64])}), "tensor b overlaps another one"),
    "gap": (file({"a": entry("F32", [8], [32, 64])}), "there is a gap before tensor a"),
    "truncated": (file({"a": WHOLE}, data=63), r"is truncated: its tensors end at byte \d+, the file at \d+; fetch"),
    "too long": (file({"a": WHOLE}, data=65), r"its tensors end at byte \d+, the file only at \d+; fetch"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_wherever_it_lies(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    path, archive = tmp_path / "model.safetensors", tmp_path / "it.zip"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_header(TensorFile.whole(path))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"fastvlm_format": 1}')
    assert not is_complete(tmp_path)
    with zipfile.ZipFile(archive, "w") as stored:
        stored.write(tmp_path / "config.json", "config.json")
        stored.write(path, "model.safetensors")
    (tmp_path / "scratch").mkdir()
    (member,) = open_archive("it.zip", archive, tmp_path / "scratch", ()).shards
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_header(member)


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    body = json.dumps(WHOLE)
    (tmp_path / "model.safetensors").write_bytes(file(f'{{"a":{body},"a":{body}}}'.encode()))
    with pytest.raises(CheckpointError, match=r"header is damaged: .*a key appears twice"):
        read_header(TensorFile.whole(tmp_path / "model.safetensors"))


def test_a_dtype_that_only_the_library_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file({"a": entry("F8_E4M3", [64], [0, 64])}))
    with pytest.raises(CheckpointError, match="tensor a has the unsupported dtype F8_E4M3"):
        read_header(TensorFile.whole(tmp_path / "model.safetensors"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path)
    opened = TensorFile.whole(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        read_header(opened)


def test_a_complete_folder_is_one_in_this_format_with_all_its_bytes(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}\n')
    assert not is_complete(tmp_path)
    config = tmp_path / "config.json"
    usable = json.dumps(full_size("0.5b").to_dict())
    for text, complete in (
        (usable, True),
        (usable.replace('"fastvlm_format": "2;', '"fastvlm_format": "3;'), False),
        (usable.replace('"fastvlm_format": "2; pip install -U fastvlm-mlx"', '"fastvlm_format": 1'), True),
        (usable.replace('"num_hidden_layers": 24', '"num_hidden_layers": "24"'), False),
        ("[" * 10_000, False),
    ):
        config.write_text(text)
        assert is_complete(tmp_path) == complete
    config.write_text(usable)
    for size in (10, 0):
        assert is_complete(tmp_path)
        os.truncate(tokenizer, size)
        assert not is_complete(tmp_path)
        tokenizer.write_text('{"version": "1.0"}\n')
    for shard, message in (
        (1, "names a shard with something other than text, 1"),
        ([], r"names a shard with something other than text, \[\]"),
        ("../model.safetensors", "names '../model.safetensors' as a shard; it can only name files beside it"),
        ("._model.safetensors", "names '._model.safetensors' as a shard"),
        ("m" * 5000, "missing; the checkpoint is incomplete"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        assert not is_complete(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path)
