"""Products of few rows with a matrix of weights, as fast as a CPU reads these.

OpenBLAS copies a large matrix into another order before it multiplies. That pays for many rows; for one it takes twice
as long as reading the weights. Small matrices it multiplies where they are. So the weights are multiplied in blocks
that count as small, a part of them on each CPU stream.
"""

import math

from fastvlm_mlx.backend import blas, mx
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.streams import worker_streams

FEW_ROWS = 8
"""Up to so many rows, blocks are faster."""

_SMALL = 10**6
"""The largest product of all three sizes that OpenBLAS counts as small, on the processors where it does."""

_SPLIT = 2**18
"""From so many weights on, dividing a product among threads pays."""


def are_few(x: mx.array) -> bool:
    """Whether the rows of `x`, (…, in), are multiplied faster by `product`."""
    return x.dtype == mx.float32 and math.prod(x.shape[:-1]) <= FEW_ROWS and "openblas" in blas().name.lower()


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out)."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    streams = worker_streams(cpu_threads() if weight.size >= _SPLIT else 1)
    parts: list[mx.array] = []
    for number, stream in enumerate(streams):
        first, end = outputs * number // len(streams), outputs * (number + 1) // len(streams)
        parts += _blocks(rows, weight[first:end], stream)
    joined = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return joined.reshape(*x.shape[:-1], outputs)


def _blocks(rows: mx.array, weight: mx.array, stream: mx.Stream) -> list[mx.array]:
    """The product in parts of its columns: blocks of equal size, and the rest."""
    count, (outputs, inputs) = rows.shape[0], weight.shape
    step = _SMALL // (inputs * count) // 16 * 16
    whole = outputs // step * step if step else 0
    parts = []
    with mx.stream(stream):
        if whole:
            columns = rows[None] @ weight[:whole].reshape(-1, step, inputs).swapaxes(1, 2)
            parts.append(columns.swapaxes(0, 1).reshape(count, whole))
        if whole < outputs:
            parts.append(rows @ weight[whole:].T)
    return parts
