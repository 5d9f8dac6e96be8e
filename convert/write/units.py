"""What a safetensors file holds side by side: tensors by themselves, and parts that are one tensor in the file.

The converter speaks of every projection of the decoder by upstream's name. In this project's format those that are
stored alike lie one after the other, and the header names them as one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastvlm_mlx.checkpoint.safetensors import ITEM_BYTES
from fastvlm_mlx.convert.arrays import Shape
from fastvlm_mlx.projections import LEAVES, fused_path, part_paths


class Stored(NamedTuple):
    """The dtype, by safetensors' name, and the shape of a tensor in a file."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        size: int = ITEM_BYTES[self.dtype] * math.prod(self.shape)
        return size


@dataclass(frozen=True)
class Unit:
    """Tensors that one file holds side by side.

    Attributes:
        tensors: In the order of their bytes.
        entries: The same bytes as the header names them.
    """

    tensors: Mapping[str, Stored]
    entries: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        return sum(stored.nbytes for stored in self.tensors.values())


def single(tensors: Mapping[str, Stored]) -> list[Unit]:
    """Every tensor by itself, under its own name."""
    return [Unit({name: stored}, {name: stored}) for name, stored in tensors.items()]


def fused(tensors: Mapping[str, Stored]) -> list[Unit]:
    """The tensors of a checkpoint in this project's format: projections that are stored alike are one tensor there.

    The parts of `projections.PARTS` are alike if they differ in nothing but their rows. Others, which a recipe
    quantizes differently, stay by themselves.
    """
    units: list[Unit] = []
    placed: set[str] = set()
    for name, stored in tensors.items():
        if name in placed:
            continue
        unit = _fused_unit(name, tensors) or Unit({name: stored}, {name: stored})
        placed.update(unit.tensors)
        units.append(unit)
    return units


def _fused_unit(name: str, tensors: Mapping[str, Stored]) -> Unit | None:
    """All tensors of the projection that a tensor is part of; None if there is none, or its parts are not alike."""
    path = fused_path(name.rpartition(".")[0])
    if path is None:
        return None
    parts = part_paths(path)
    unit: dict[str, Stored] = {}
    entries: dict[str, Stored] = {}
    for leaf in LEAVES:
        members = {f"{part}.{leaf}": tensors[f"{part}.{leaf}"] for part in parts if f"{part}.{leaf}" in tensors}
        if not members:
            continue
        if len(members) < len(parts) or len({(each.dtype, each.shape[1:]) for each in members.values()}) > 1:
            return None
        first = members[f"{parts[0]}.{leaf}"]
        unit |= members
        rows = sum(member.shape[0] for member in members.values())
        entries[f"{path}.{leaf}"] = Stored(first.dtype, (rows, *first.shape[1:]))
    return Unit(unit, entries)
