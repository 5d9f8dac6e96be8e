"""Reads source tensors as the converter uses them: float32, channels last, dequantized, whole or by rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import QUANTIZATION_MODES, LayerQuantization
from fastvlm_mlx.convert.arrays import Array, Shape, dequantize, float32, to_mlx
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.schema import shown

_COPIED_BYTES = 2**24
"""Bytes of a packed tensor that are copied at a time."""
_NOT_A_NUMBER = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}
"""The scales that stand for NaN, in the modes whose scales are bytes."""
_CHUNK_ELEMENTS = 2**20
"""Elements handled at a time: 4 MB in float32, which a processor's cache holds."""
_SAMPLES, _SAMPLED_ROWS = 4, 4
"""Of a tensor on a server: pieces that are compared, and rows of each."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The companions and settings of a quantized tensor, as MLX stores them.

    Attributes:
        scales: One per group.
        biases: One per group; None in the modes that have none.
        group_size: Weights per group.
        bits: Bits per weight.
        mode: MLX's name for the arithmetic.
    """

    scales: Tensor
    biases: Tensor | None
    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the source and the shape in which it is used.

    Attributes:
        tensor: The bytes.
        shape: Channels last; (O, I) for the weight of a linear layer.
        transpose: Whether the source has a convolution's input channels second.
        packing: How it is quantized, if it is.
        factor: A power of two that its values are multiplied by.
    """

    tensor: Tensor
    shape: Shape
    transpose: bool
    packing: Packing | None = None
    factor: float = 1.0

    def chunks(self) -> Iterator[Array]:
        """The rows in float32, a few at a time.

        Raises:
            CheckpointError: If the file is truncated or a value is not finite.
        """
        for first, count in self._steps():
            yield self._rows(first, count)

    def load(self) -> Array:
        """All rows in float32.

        Raises:
            CheckpointError: If the file is truncated or a value is not finite.
        """
        return self._rows(0, self.shape[0])

    @property
    def packed(self) -> dict[str, Tensor]:
        """The stored tensors of a quantized one: `weight`, `scales` and, where there are any, `biases`."""
        assert self.packing is not None
        parts = {"weight": self.tensor, "scales": self.packing.scales, "biases": self.packing.biases}
        return {name: part for name, part in parts.items() if part is not None}

    def stored(self, part: str) -> Iterator[npt.NDArray[Any]]:
        """The rows of a part of a quantized tensor as they are stored, a few at a time.

        Raises:
            CheckpointError: If the file is truncated or a scale or bias is not finite.
        """
        assert self.packing is not None
        tensor = self.packed[part]
        broken = _NOT_A_NUMBER.get(self.packing.mode, ())
        step = max(1, _COPIED_BYTES * tensor.shape[0] // tensor.nbytes)
        for first in range(0, tensor.shape[0], step):
            rows = tensor.read(first, min(step, tensor.shape[0] - first))
            if part != "weight" and (not np.isfinite(float32(rows, tensor.dtype)).all() or np.isin(rows, broken).any()):
                raise CheckpointError(f"{_label(tensor)} holds NaN or infinite values")
            yield rows

    def equals(self, other: "Weight") -> bool:
        """Whether both hold the same values; compares a few rows at a time, up to the first difference.

        Over a network it compares a sample of the rows.
        """
        if self.shape != other.shape:
            return False
        stored_alike = self.tensor.dtype == other.tensor.dtype and not (self.packing or other.packing)
        for first, count in self._sample() if self.tensor.file.remote else self._steps():
            if stored_alike:
                mine, theirs = self.tensor.read(first, count), other.tensor.read(first, count)
            else:
                mine, theirs = self._rows(first, count), other._rows(first, count)
            if not np.array_equal(mine, theirs):
                return False
        return True

    def _steps(self) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of each chunk."""
        rows = self.shape[0]
        step = max(1, _CHUNK_ELEMENTS * rows // max(1, math.prod(self.shape)))
        for first in range(0, rows, step):
            yield first, min(step, rows - first)

    def _sample(self) -> Iterator[tuple[int, int]]:
        """The first row and the number of rows of a few pieces: the beginning, the end, and some between."""
        rows = self.shape[0]
        count = min(rows, _SAMPLED_ROWS)
        for piece in range(_SAMPLES):
            yield piece * (rows - count) // (_SAMPLES - 1), count

    def _rows(self, first: int, count: int) -> Array:
        if self.packing is None:
            if self.tensor.shape[0] == self.shape[0]:
                values = float32(self.tensor.read(first, count), self.tensor.dtype)
            else:  # a layer scale of shape (1, 1, C)
                values = float32(self.tensor.read(), self.tensor.dtype).reshape(-1)[first : first + count]
        else:
            values = _dequantize(self.tensor, self.packing, first, count)
        if self.transpose:
            values = np.moveaxis(values, 1, -1)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{_label(self.tensor)} holds NaN or infinite values")
        if self.factor != 1:
            values = values * np.float32(self.factor)
        return np.ascontiguousarray(values.reshape(count, *self.shape[1:]))


def weight(
    tensor: Tensor,
    shape: Shape,
    *,
    channels_last: bool,
    companions: tuple[Tensor, ...] = (),
    quantization: LayerQuantization | None = None,
    factor: float = 1.0,
) -> Weight:
    """The tensor in the shape that the model needs.

    Args:
        tensor: From the source.
        shape: The shape needed: channels last, (O, I) for a linear layer, (C,) for a vector.
        channels_last: Whether the source's convolutions are channels last.
        companions: A quantized tensor's scales and, where it has them, biases.
        quantization: How it is quantized, by the source's config; None if that does not say.
        factor: A power of two that its values are multiplied by.

    Raises:
        CheckpointError: If the tensor has another shape or dtype, or the quantization does not fit.
    """
    if companions:
        packing = _packing(tensor, shape, companions, quantization)
        return Weight(tensor=tensor, shape=shape, transpose=False, packing=packing, factor=factor)
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{_label(tensor)} is {tensor.dtype}; expected F32, F16 or BF16")
    transpose = len(tensor.shape) == 4 and not channels_last
    stored = (tensor.shape[0], *tensor.shape[2:], tensor.shape[1]) if transpose else tensor.shape
    if len(shape) == 1 and len(stored) > 1:
        fits = tuple(size for size in stored if size != 1) == tuple(size for size in shape if size != 1)
    elif len(shape) == 2 and len(stored) == 4:
        fits = stored == (shape[0], 1, 1, shape[1])
    else:
        fits = stored == shape
    if not fits:
        expected = (shape[0], shape[3], shape[1], shape[2]) if transpose and len(shape) == 4 else shape
        raise CheckpointError(f"{_label(tensor)} has shape {list(tensor.shape)}, expected {list(expected)}")
    return Weight(tensor=tensor, shape=shape, transpose=transpose, factor=factor)


def _label(tensor: Tensor) -> str:
    return f"{tensor.file.label}: tensor {printable(tensor.name)}"


def _packing(
    tensor: Tensor, shape: Shape, companions: tuple[Tensor, ...], expected: LayerQuantization | None
) -> Packing:
    """The quantization of a tensor: shapes and dtypes decide, and what the config says of it has to agree."""
    scales, biases = companions[0], companions[1] if len(companions) > 1 else None
    rows, columns = shape[0], shape[-1]
    groups = scales.shape[-1] if scales.shape else 0
    cannot_hold = (
        f"{_label(tensor)} ({tensor.dtype} {list(tensor.shape)}, scales {scales.dtype} {list(scales.shape)}) is "
        f"quantized in no way that MLX knows; it cannot hold {list(shape)}"
    )
    fits = (
        len(shape) == 2
        and tensor.dtype == "U32"
        and tensor.shape[:1] == scales.shape[:1] == (rows,)
        and len(tensor.shape) == len(scales.shape) == 2
        and (biases is None or (biases.shape, biases.dtype) == (scales.shape, scales.dtype))
        and groups > 0
        and columns % groups == 0
        and tensor.shape[1] * 32 % columns == 0
    )
    if not fits:
        raise CheckpointError(cannot_hold)
    if biases is None and expected is not None and expected.mode == "affine":
        raise CheckpointError(f"{_label(tensor)} has no biases for mode 'affine'")
    group_size, bits = columns // groups, tensor.shape[1] * 32 // columns
    modes = [
        mode
        for mode, (supported, sizes) in QUANTIZATION_MODES.items()
        if bits in supported and group_size in sizes and (mode == "affine") == (biases is not None)
    ]
    if not modes or scales.dtype not in (("U8",) if biases is None else ("F32", "F16", "BF16")):
        raise CheckpointError(cannot_hold)
    actual = LayerQuantization(group_size=group_size, bits=bits, mode=modes[0])
    if expected is not None:
        for key, value in actual.to_dict().items():
            if (said := getattr(expected, key)) not in (None, value):
                raise CheckpointError(
                    f"{_label(tensor)} is quantized with {key} {value}, config.json says {shown(said)}"
                )
    return Packing(scales=scales, biases=biases, group_size=group_size, bits=bits, mode=modes[0])


def _dequantize(tensor: Tensor, packing: Packing, first: int, count: int) -> Array:
    weight, scales = (to_mlx(part.read(first, count), part.dtype) for part in (tensor, packing.scales))
    biases = packing.biases and to_mlx(packing.biases.read(first, count), packing.biases.dtype)
    settings = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    return np.array(dequantize(weight, scales, biases, **settings), copy=False)
