"""Products of rows with a matrix of weights, in the form that OpenBLAS computes fastest.

OpenBLAS copies a large matrix into another order before it multiplies. That pays for many rows; for one it takes twice
as long as reading the weights. Small matrices it multiplies where they are. So for few rows the weights are multiplied
in blocks that count as small, a part of them on each CPU stream.

From there up to some hundred rows, it is slow on those that are left when it has taken `_UNIT` at a time, so that rows
of zeros pay for themselves.
"""

import math

from fastvlm_mlx.backend import blas, device, mx
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.streams import worker_streams

FEW_ROWS = 31
"""Up to so many rows, blocks are faster."""

_SMALL = 10**6
"""The largest product of all three sizes that OpenBLAS counts as small, on the processors where it does."""

_SPLIT = 2**18
"""From so many weights on, dividing a product among threads pays."""

_UNIT = 16
"""Rows that OpenBLAS multiplies together, and the columns of a block, where as many fit."""

_MANY_ROWS = 96
"""From so many rows on, the last ones no longer count."""


def are_few(x: mx.array) -> bool:
    """Whether `product` multiplies the rows of `x`, (…, in), in blocks."""
    return suits(x) and math.prod(x.shape[:-1]) <= FEW_ROWS


def suits(x: mx.array) -> bool:
    """Whether `product` is the fastest form for `x`, on the device that is in use."""
    return device() == "cpu" and x.dtype == mx.float32 and "openblas" in blas().name.lower()


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out)."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    count = len(rows)
    if count <= FEW_ROWS:
        products = _of_few(rows, weight)
    elif count < _MANY_ROWS and count % _UNIT:
        products = (mx.pad(rows, [(0, -count % _UNIT), (0, 0)]) @ weight.T)[:count]
    else:
        products = rows @ weight.T
    return products.reshape(*x.shape[:-1], outputs)


def _of_few(rows: mx.array, weight: mx.array) -> mx.array:
    """Each stream multiplies by a part of the weights."""
    outputs = weight.shape[0]
    streams = worker_streams(cpu_threads() if weight.size >= _SPLIT else 1)
    parts: list[mx.array] = []
    for number, stream in enumerate(streams):
        first, end = outputs * number // len(streams), outputs * (number + 1) // len(streams)
        parts += _blocks(rows, weight[first:end], stream)
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _blocks(rows: mx.array, weight: mx.array, stream: mx.Stream) -> list[mx.array]:
    """The product in parts of its columns: blocks of equal size, and the rest."""
    count, (outputs, inputs) = len(rows), weight.shape
    most = _SMALL // (inputs * count)
    step = most // _UNIT * _UNIT or most // 4 * 4
    whole = outputs // step * step if step else 0
    parts = []
    with mx.stream(stream):
        if whole:
            columns = rows[None] @ weight[:whole].reshape(-1, step, inputs).swapaxes(1, 2)
            parts.append(columns.swapaxes(0, 1).reshape(count, whole))
        if whole < outputs:
            parts.append(rows @ weight[whole:].T)
    return parts
