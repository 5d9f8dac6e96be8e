"""The parts of fused projections as tensors of their own, by upstream's names; they share the bytes of a file."""

from collections.abc import Mapping
from dataclasses import replace

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.projections import part_paths


def in_parts(tensors: Mapping[str, Tensor], text: TextConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint in this project's format, each fused projection as the rows of its parts.

    Raises:
        CheckpointError: If one does not have the rows of its parts.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        sizes = text.part_rows.get(path.rpartition(".")[2])
        if sizes is None:
            result[name] = tensor
            continue
        if tensor.shape[:1] != (sum(sizes),):
            raise CheckpointError(
                f"{tensor.file.label}: {printable(name)} has shape {list(tensor.shape)}, but config.json needs "
                f"{sum(sizes)} rows; convert the checkpoint again"
            )
        start, row_bytes = tensor.start, tensor.nbytes // sum(sizes)
        for part, rows in zip(part_paths(path), sizes, strict=True):
            name = f"{part}.{leaf}"
            result[name] = replace(tensor, name=name, shape=(rows, *tensor.shape[1:]), start=start)
            start += rows * row_bytes
    return result
