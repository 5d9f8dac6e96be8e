"""Products with quantized weights on a CPU.

For one row, packed weights are as fast as float32 ones, since memory limits both. For many rows MLX's CPU backend takes
as long for each; there, unpacking a layer's weights first is faster.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.streams import worker_streams

DENSE_ROWS = 4
"""From so many rows on, unpacking a layer costs less than multiplying with it packed."""

_BLOCK = 2**22
"""Weights unpacked at a time."""

_SPLIT = 2**18
"""From so many weights on, dividing a product among threads pays."""

_Layer = TypeVar("_Layer", bound=nn.Module)


class CPUQuantizedLinear(nn.QuantizedLinear):
    """A quantized linear that unpacks its weights to multiply many rows."""

    @classmethod
    def from_quantized(cls, layer: nn.QuantizedLinear) -> "CPUQuantizedLinear":
        """The same layer, sharing its arrays."""
        return _sharing(cls, layer)

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, out)."""
        y = packed_product(x, self) if math.prod(x.shape[:-1]) < DENSE_ROWS else unpacked_product(x, self)
        return y + self.bias if "bias" in self else y


class CPUQuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding that, used as the head, unpacks its weights to multiply many rows."""

    @classmethod
    def from_quantized(cls, layer: nn.QuantizedEmbedding) -> "CPUQuantizedEmbedding":
        """The same layer, sharing its arrays."""
        return _sharing(cls, layer)

    def as_linear(self, x: mx.array) -> mx.array:
        """(…, D) -> (…, V)."""
        return packed_product(x, self) if math.prod(x.shape[:-1]) < DENSE_ROWS else unpacked_product(x, self)


def _sharing(cls: type[_Layer], layer: nn.Module) -> _Layer:
    """A `cls` with the arrays and settings of `layer`, made without initializing weights first."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    made.__dict__.update(layer.__dict__)
    dict.update(made, layer)
    return made


def packed_product(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out), a part of the outputs on each CPU stream.

    MLX's CPU backend multiplies with quantized weights on the one thread of a stream.
    """
    outputs = layer.weight.shape[0]
    split = outputs * x.shape[-1] >= _SPLIT
    streams: Sequence[mx.Stream | None] = worker_streams(cpu_threads()) if split else [None]
    products = []
    for part, stream in enumerate(streams):
        rows = slice(outputs * part // len(streams), outputs * (part + 1) // len(streams))
        biases = layer.biases[rows] if "biases" in layer else None
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        products.append(
            mx.quantized_matmul(x, layer.weight[rows], layer.scales[rows], biases, stream=stream, **settings)
        )
    return mx.concatenate(products, axis=-1) if len(products) > 1 else products[0]


def unpacked_product(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out), with only a block of the weights unpacked at a time."""
    step = max(1, _BLOCK // x.shape[-1])
    products = []
    for first in range(0, layer.weight.shape[0], step):
        rows = slice(first, first + step)
        biases = layer.biases[rows] if "biases" in layer else None
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        slices = column_slices(layer.weight[rows], layer.scales[rows], biases, **settings)
        terms = [x[..., index :: len(slices)] @ columns.astype(x.dtype).T for index, columns in enumerate(slices)]
        products.append(functools.reduce(mx.add, terms))
    return mx.concatenate(products, axis=-1) if len(products) > 1 else products[0]


def column_slices(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> list[mx.array]:
    """Dequantized weights (out, in) as slices of their columns: each n-th, beginning with 0, 1, …, n - 1.

    MLX packs affine weights as one stream of bits, n of them into the fewest whole bytes. Each of the n has its own
    shifts, and columns that share them are taken together; MLX's own function takes each weight by itself, several
    times slower on a CPU.
    """
    if mode != "affine" or biases is None:
        return [mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)]
    return _unpack(bits)(weight, scales, biases)


@functools.cache
def _unpack(bits: int) -> Callable[..., list[mx.array]]:
    """`column_slices` of affine weights, as one fused function."""
    together = 8 // math.gcd(8, bits)
    mask = 2**bits - 1

    def unpack(weight: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        rows, groups = scales.shape
        stream = weight.view(mx.uint8).reshape(rows, groups, -1, together * bits // 8)
        slices = []
        for index in range(together):
            byte, shift = divmod(index * bits, 8)
            values = stream[..., byte] >> shift
            if shift + bits > 8:
                values = values | (stream[..., byte + 1] << (8 - shift))
            values = (values & mask).astype(scales.dtype)
            slices.append((values * scales[..., None] + biases[..., None]).reshape(rows, -1))
        return slices

    return mx.compile(unpack)
