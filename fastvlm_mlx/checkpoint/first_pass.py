"""Prepares a decoder's first prompt before its weights are read; see `fastvlm_mlx.model.cpu.first_pass`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint import fusing
from fastvlm_mlx.checkpoint.casting import cast_on_streams
from fastvlm_mlx.checkpoint.folder import read_files
from fastvlm_mlx.checkpoint.safetensors import Tensor, TensorFile, read_header
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.model.cpu.first_pass import FirstPass
from fastvlm_mlx.model.language import Qwen2

_BLOCKS = "language_model.model.layers."
_EMBEDDING = "language_model.model.embed_tokens.weight"


def first_pass(decoder: Qwen2, files: Sequence[TensorFile], config: ModelConfig, stream: mx.Stream) -> FirstPass:
    """The first pass of a decoder that has not been read.

    Args:
        decoder: Its projections are fused, and it has no quantized weights.
        files: Of the checkpoint.
        config: Of the checkpoint.
        stream: What the blocks are read on.
    """
    dtype = decoder.model.norm.weight.dtype
    weights = fusing.fused(cast_on_streams([read_files(files, stream)], [stream], dtype), config, [stream])
    blocks: list[dict[str, mx.array]] = [{} for _ in decoder.layers]
    for name, value in weights.items():
        if name.startswith(_BLOCKS):
            number, _, path = name.removeprefix(_BLOCKS).partition(".")
            blocks[int(number)][path] = value
    found = [replace(file, path=file.path.absolute()) for file in files]  # the working folder may change

    def embedded(tokens: npt.NDArray[np.int32]) -> mx.array:
        table = next(tensor for file in found for tensor in read_header(file) if tensor.name == _EMBEDDING)
        return mx.concatenate([_row(table, int(token)) for token in tokens]).astype(dtype)

    return FirstPass(decoder, blocks, embedded)


def _row(table: Tensor, token: int) -> mx.array:
    row = mx.array(table.read(token, 1))
    return row.view(mx.bfloat16) if table.dtype == "BF16" else row
