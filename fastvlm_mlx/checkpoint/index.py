"""The index of a checkpoint whose tensors are in several files."""

import os
from pathlib import Path

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.schema import read_object, shown

INDEX_FILE = "model.safetensors.index.json"


def weight_map(folder: Path, label: str) -> dict[str, str] | None:
    """The name of the file in `folder` that holds each tensor, by its index; None if it has none.

    Args:
        folder: Of the checkpoint.
        label: What messages call the index.

    Raises:
        CheckpointError: If the index is damaged, or names something other than files beside it.
    """
    index = read_object(folder / INDEX_FILE, label)
    if index is None:
        return None
    placement = index.get("weight_map")
    if not isinstance(placement, dict):
        raise CheckpointError(f"{label}: has no weight_map; fetch it again")
    for shard in placement.values():
        if not isinstance(shard, str):
            raise CheckpointError(f"{label}: names a shard with something other than text, {shown(shard)}")
        if shard.startswith(".") or os.path.basename(shard) != shard:
            raise CheckpointError(f"{label}: names {shown(shard)} as a shard; it can only name files beside it")
    return placement
