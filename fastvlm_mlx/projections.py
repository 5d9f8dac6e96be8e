"""The projections of the decoder that are one matrix here and several in every other program.

Their rows lie one part after the other, so that one product computes all of them. Whoever speaks of weights by name,
a quantization recipe or an export, uses the names of the parts, which are upstream's.
"""

from collections.abc import Mapping

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The parts of each fused projection, in the order of their rows."""

LEAVES = ("weight", "scales", "biases", "bias")
"""The tensors that a projection may have; those of a quantized one are the first three."""

_WHOLE = {part: fused for fused, parts in PARTS.items() for part in parts}


def part_paths(path: str) -> tuple[str, ...]:
    """The paths of the parts of the layer at `path`, of one that is not fused its own."""
    parent, _, name = path.rpartition(".")
    return tuple(f"{parent}.{part}" for part in PARTS[name]) if parent and name in PARTS else (path,)


def fused_path(path: str) -> str | None:
    """The path of the fused layer that the layer at `path` is a part of; None if it is no such part."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{_WHOLE[name]}" if parent and name in _WHOLE else None
