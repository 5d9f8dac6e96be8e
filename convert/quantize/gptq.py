"""Quantizes a layer with error compensation (GPTQ, arXiv 2210.17323), in closed form and without training.

Columns are rounded one by one. The error that rounding a column adds to the layer's output is compensated by changing
the columns that are not rounded yet, to the least squares of X·(W − Ŵ)ᵀ over the calibration inputs X (rows, in). This
needs XᵀX only, which GPTQ calls the Hessian.
"""

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.convert.arrays import Array, Packed, from_mlx
from fastvlm_mlx.convert.quantize.scheme import LayerScheme

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a fraction of its mean: regularizes rarely excited directions."""

_BLOCK = 128
_CLIPS = np.linspace(1.0, 0.7, 7, dtype=np.float32)
"""The fractions of a group's range that its grid may span; the one with the least squared error is taken."""


def compensated(
    weight: Array, hessian: npt.NDArray[np.float64], scheme: LayerScheme, dtype: str
) -> tuple[Packed, Array]:
    """A layer quantized with compensation, and its dequantized weights.

    Args:
        weight: (out, in).
        hessian: XᵀX of its inputs, (in, in).
        scheme: An affine one.
        dtype: The dtype of the scales: `float16`, `bfloat16` or `float32`.
    """
    weight = weight.copy()
    factor = _factor(hessian)
    inputs = weight.shape[1]
    levels = np.empty(weight.shape, np.uint8)
    scales = np.empty((weight.shape[0], inputs // scheme.group_size), np.float32)
    biases = np.empty_like(scales)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        block = weight[:, start:end]
        errors = np.empty_like(block)
        for offset, column in enumerate(range(start, end)):
            group = column // scheme.group_size
            if column % scheme.group_size == 0:
                members = block[:, offset : offset + scheme.group_size]
                scales[:, group], biases[:, group] = _grid(members, scheme.bits, dtype)
            level = np.rint((block[:, offset] - biases[:, group]) / scales[:, group])
            level = np.clip(level, 0, 2**scheme.bits - 1)
            levels[:, column] = level
            rounded = level * scales[:, group] + biases[:, group]
            errors[:, offset] = (block[:, offset] - rounded) / factor[column, column]
            block[:, offset + 1 :] -= np.outer(errors[:, offset], factor[column, column + 1 : end])
            block[:, offset] = rounded
        weight[:, end:] -= errors @ factor[start:end, end:]
    packed: Packed = {
        "weight": pack(levels, scheme.bits),
        "scales": _stored(scales, dtype),
        "biases": _stored(biases, dtype),
    }
    return packed, weight


def _factor(hessian: npt.NDArray[np.float64]) -> Array:
    """The upper triangular U with UᵀU = (XᵀX + damping)⁻¹, by the Cholesky factor of the matrix read backwards."""
    diagonal = np.diagonal(hessian)
    damped = hessian + np.eye(len(hessian)) * (DAMPING * diagonal.mean() or 1.0)
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1], np.float32)


def _grid(members: Array, bits: int, dtype: str) -> tuple[Array, Array]:
    """Scale and bias (out,) of a group (out, group size): the clipped range with the least squared error."""
    top = 2**bits - 1
    low, high = members.min(axis=1), members.max(axis=1)
    best: Array = np.full(len(members), np.inf, np.float32)
    scale, bias = np.ones_like(best), np.zeros_like(best)
    for clip in _CLIPS:
        step = _rounded((high - low) * (clip / top), dtype)
        step = np.where(step > 0, step, np.float32(1))
        offset = _rounded(low * clip, dtype)
        level = np.clip(np.rint((members - offset[:, None]) / step[:, None]), 0, top)
        error = np.square(level * step[:, None] + offset[:, None] - members).sum(axis=1)
        better = error < best
        best, scale, bias = np.where(better, error, best), np.where(better, step, scale), np.where(better, offset, bias)
    return scale, bias


def _rounded(values: Array, dtype: str) -> Array:
    """Float32 values rounded to `dtype`."""
    return np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))


def _stored(values: Array, dtype: str) -> npt.NDArray[np.generic]:
    """Values as a file of that dtype holds them."""
    rounded: npt.NDArray[np.generic] = from_mlx(mx.array(values).astype(getattr(mx, dtype)))
    return rounded


def pack(levels: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Levels (out, in) as MLX packs them, (out, in · bits / 32): one stream of bits, the lowest first."""
    stream = np.unpackbits(levels[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(levels), -1), axis=-1, bitorder="little").view(np.uint32)
