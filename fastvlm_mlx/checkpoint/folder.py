"""A converted checkpoint as a folder: whether it is one, its files and its tensors."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.index import INDEX_FILE, weight_map
from fastvlm_mlx.checkpoint.safetensors import TensorFile, check, file_version
from fastvlm_mlx.config import READABLE_FORMATS, ModelConfig, format_number
from fastvlm_mlx.errors import CheckpointError, FastVLMError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.machine import descriptor_zero_taken
from fastvlm_mlx.schema import read_object
from fastvlm_mlx.streams import turn


def format_version(folder: Path) -> int | None:
    """The version of this project's format that a folder is written in; None if it names none."""
    return format_number(_format_entry(folder))


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in this project's format, of whatever version."""
    return _format_entry(folder) is not None


def _format_entry(folder: Path) -> Any:
    try:
        return (read_object(folder / "config.json") or {}).get("fastvlm_format")
    except CheckpointError:
        return None


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in a format that this version reads, and no file is missing or cut off."""
    if format_version(folder) not in READABLE_FORMATS:
        return False
    try:
        ModelConfig.from_path(folder)
        checked_files(folder)
        return _is_whole_json(folder / "tokenizer.json")
    except (FastVLMError, OSError):
        return False


def _is_whole_json(path: Path) -> bool:
    """Whether a file begins and ends as a JSON object does; reading all of a large one takes long."""
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(-min(16, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return first == b"{" and file.read().rstrip().endswith(b"}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a converted folder, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or one that the index names is missing.
    """
    placement = weight_map(folder, printable(folder / INDEX_FILE))
    if placement is None:
        files = sorted(folder.glob("model*.safetensors"))
    else:
        files = [folder / name for name in sorted(set(placement.values()))]
    if missing := [file.name for file in files if not os.path.isfile(file)]:  # a name may be too long for `Path`
        raise CheckpointError(f"{printable(folder)}: {names(missing)} missing; the checkpoint is incomplete")
    if not files:
        raise CheckpointError(f"{printable(folder)}: no model*.safetensors in it")
    return files


def checked_files(folder: Path) -> list[TensorFile]:
    """The safetensors files of a converted folder, each checked for completeness.

    Raises:
        CheckpointError: If a file is missing, truncated or no safetensors file.
    """
    files = [TensorFile.whole(path) for path in weight_files(folder)]
    for file in files:
        check(file)
    return files


def read_files(files: Iterable[TensorFile], stream: mx.Stream | None = None) -> dict[str, mx.array]:
    """Every tensor of checked files; MLX reads it on `stream` when it is first used, from the file as it is now.

    Raises:
        CheckpointError: If MLX cannot read a file, one has changed since it was checked, or two hold the same tensor.
    """
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            path = str(file.path)
            path.encode()
            with descriptor_zero_taken():
                arrays: Any = mx.load(path, stream=stream)
            version = file_version(os.stat(path))
        except UnicodeEncodeError as err:
            raise CheckpointError(f"{file.label}: MLX cannot open a path that is not UTF-8; rename it") from err
        except (RuntimeError, ValueError, OSError) as err:
            raise CheckpointError(f"{file.label}: cannot be read as safetensors ({printable(err)})") from err
        if version != file.version:
            raise CheckpointError(f"{file.label}: has changed while it was read; try again when it is complete")
        if twice := sorted(weights.keys() & arrays.keys()):
            raise CheckpointError(f"{file.label}: holds {names(twice)}, which another file holds, too")
        weights.update(arrays)
    return weights


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a converted folder; see `checked_files` and `read_files`."""
    return read_files(checked_files(folder))


def all_finite(folder: Path) -> bool:
    """Whether no weight of a converted folder is NaN or infinite; reads all of them.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    with turn():
        floating = [value for value in read_weights(folder).values() if mx.issubdtype(value.dtype, mx.floating)]
        return all(mx.isfinite(value).all().item() for value in floating)
