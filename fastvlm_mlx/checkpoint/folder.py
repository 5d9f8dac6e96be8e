"""A converted checkpoint as a folder: whether it is one, its files and its tensors."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.safetensors import TensorFile, check
from fastvlm_mlx.config import FORMAT_VERSION
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names

_INDEX = "model.safetensors.index.json"


def format_version(folder: Path) -> Any:
    """The version of this project's format that a folder is written in; None if it is no converted checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config.get("fastvlm_format") if isinstance(config, dict) else None


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in this project's format."""
    return format_version(folder) is not None


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in this version's format, with all its weight files undamaged."""
    if format_version(folder) != FORMAT_VERSION:
        return False
    try:
        checked_files(folder)
    except (CheckpointError, OSError):
        return False
    return True


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a converted folder, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or one that the index names is missing.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            placement = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = sorted({str(name) for name in placement.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise CheckpointError(f"{index}: cannot be read as an index ({err})") from err
        files = [folder / name for name in listed]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if missing := [file.name for file in files if not os.path.isfile(file)]:  # a name may be too long for `Path`
        raise CheckpointError(f"{folder}: {names(missing)} missing; the checkpoint is incomplete")
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors in it")
    return files


def checked_files(folder: Path) -> list[Path]:
    """The safetensors files of a converted folder, each checked for completeness.

    Raises:
        CheckpointError: If a file is missing, truncated or no safetensors file.
    """
    files = weight_files(folder)
    for file in files:
        check(TensorFile.whole(file))
    return files


def read_files(files: Iterable[Path], stream: mx.Stream | None = None) -> dict[str, mx.array]:
    """Every tensor of checked files; MLX reads it on `stream` when it is first used.

    Raises:
        CheckpointError: If MLX cannot read a file.
    """
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            arrays: Any = mx.load(str(file), stream=stream)
        except (RuntimeError, ValueError) as err:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({err})") from err
        weights.update(arrays)
    return weights


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of a converted folder; see `checked_files` and `read_files`."""
    return read_files(checked_files(folder))
