"""Quantizes a layer by rounding each weight to the nearest level, a few rows at a time."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.convert.arrays import Packed, from_mlx, to_mlx
from fastvlm_mlx.convert.compare.weights import WeightError
from fastvlm_mlx.convert.quantize.scheme import LayerScheme
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.model.cpu.quantized import column_slices
from fastvlm_mlx.streams import turn, worker_streams

_CHUNK = 2**22
"""Weights quantized at a time on each stream."""


def rounded(tensor: Tensor, scheme: LayerScheme) -> tuple[Packed, WeightError]:
    """A layer with each weight rounded to the nearest level, and the error; each stream handles a part of the rows."""
    streams = cpu_threads() if device() == "cpu" else 1
    rows, columns = tensor.shape
    step = max(1, min(_CHUNK // columns, -(-rows // streams)))
    parts: dict[str, list[npt.NDArray[np.generic]]] = {}
    change = norm = 0.0
    for first in range(0, rows, step * streams):
        work = []
        with turn():
            for stream, start in zip(_streams(streams), range(first, rows, step), strict=False):
                exact = tensor.read(start, min(step, rows - start))
                with mx.stream(stream):
                    work.append(_rounded(to_mlx(exact, tensor.dtype), scheme))
            mx.eval(work)
        for arrays, squares in work:
            for name, value in zip(("weight", "scales", "biases"), arrays, strict=False):
                parts.setdefault(name, []).append(from_mlx(value))
            change, norm = change + float(squares[0]), norm + float(squares[1])
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}, WeightError(change, norm)


def _streams(count: int) -> list[mx.Stream]:
    """The streams to share the work among, for use within a turn: MLX runs each CPU stream on a thread of its own."""
    return worker_streams(count) if device() == "cpu" else [mx.default_stream(mx.default_device())]


def _rounded(exact: mx.array, scheme: LayerScheme) -> tuple[Sequence[mx.array], tuple[mx.array, mx.array]]:
    """The arrays of quantized weights, and the sums of the squares of the change and of the exact weights."""
    wide = exact.astype(mx.float32)  # a CPU is slow in half precision
    weight, *companions = mx.quantize(wide, scheme.group_size, scheme.bits, scheme.mode)
    if scheme.mode == "affine":
        stored = [companion.astype(exact.dtype) for companion in companions]
        companions = [companion.astype(mx.float32) for companion in stored]
    else:
        stored = companions
    scales, biases = companions[0], companions[1] if len(companions) > 1 else None
    slices = column_slices(weight, scales, biases, **scheme.to_dict())
    errors = [_square(wide[:, i :: len(slices)] - values) for i, values in enumerate(slices)]
    return (weight, *stored), (functools.reduce(mx.add, errors), _square(wide))


def _square(values: mx.array) -> mx.array:
    """The sum of the squares, as a product, which the BLAS computes."""
    flat = values.reshape(1, -1)
    return (flat @ flat.T)[0, 0]
