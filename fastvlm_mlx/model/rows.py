"""Parts of the rows of a linear layer, as layers that share its memory."""

from collections.abc import Sequence
from itertools import accumulate

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.projections import PARTS


def row_parts(layer: nn.Module, parts: int | Sequence[int]) -> list[nn.Module]:
    """A layer for each of `parts` equal parts of the outputs of `layer`, or for parts of these numbers of outputs."""
    rows = layer.weight.shape[0]
    sizes = [rows // parts] * parts if isinstance(parts, int) else list(parts)
    ends = list(accumulate(sizes))
    return [_part(layer, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _part(layer: nn.Module, rows: slice) -> nn.Module:
    """A layer of the same class and settings with some of the rows, made without initializing weights first."""
    made = type(layer).__new__(type(layer))
    nn.Module.__init__(made)
    made.__dict__.update(layer.__dict__)
    dict.update(made, {name: value[rows] if isinstance(value, mx.array) else value for name, value in layer.items()})
    return made


def split_projection(module: nn.Module, fused: str, sizes: Sequence[int]) -> None:
    """Replaces a fused projection of `module`, in place, by its parts, which share its memory.

    Args:
        module: The parent of the projection.
        fused: Its name, `qkv_proj` or `gate_up_proj`.
        sizes: The rows of each part.
    """
    for name, part in zip(PARTS[fused], row_parts(module[fused], sizes), strict=True):
        module[name] = part
    del module[fused]
