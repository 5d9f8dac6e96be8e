"""Reads the part of a checkpoint that one rank has: nothing else is read from the disk."""

from pathlib import Path

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import checked_files
from fastvlm_mlx.checkpoint.safetensors import Tensor, read_header
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.model.sharding import Part, part_of


def read_slices(folder: Path, config: ModelConfig, rank: int, size: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors of a converted folder, those of the decoder's layers only in the part that a rank has.

    Args:
        folder: A converted checkpoint.
        config: Of it.
        rank: Of this process.
        size: How many there are.
        dtype: That floating-point tensors are cast to.

    Raises:
        CheckpointError: If the files are damaged, or one changes meanwhile.
        ConfigError: If groups of quantized weights would be divided.
    """
    weights: dict[str, mx.array] = {}
    for file in checked_files(folder):
        for tensor in read_header(file):
            part = part_of(tensor.name, tensor.shape, config.text_config, rank, size)
            value = _read(tensor, part)
            castable = mx.issubdtype(value.dtype, mx.floating) and value.dtype != dtype
            weights[tensor.name] = value.astype(dtype) if castable else value
            mx.eval(weights[tensor.name])
    return weights


def _read(tensor: Tensor, part: Part) -> mx.array:
    if part.columns is not None:
        stored = tensor.read_columns(*part.columns)
    elif part.rows:
        stored = np.concatenate([tensor.read(start, end - start) for start, end in part.rows])
    else:
        stored = tensor.read()
    if tensor.dtype == "F64":
        raise CheckpointError(f"{tensor.file.label}: {tensor.name} is stored in float64; convert the checkpoint again")
    value = mx.array(stored)
    return value.view(mx.bfloat16) if tensor.dtype == "BF16" else value
