"""Depthwise convolutions as products with banded matrices, on feature maps (C, B, H, W).

A depthwise convolution is a sum of k batched matrix products, one per kernel row: T outputs of a row need
S = (T - 1)·stride + k inputs, and an (S, T) matrix with the kernel's row along its diagonal maps one to the other.
MLX's own depthwise convolution is a scalar loop on a CPU, tens of times slower.
"""

import math
from collections.abc import Callable

from fastvlm_mlx.backend import mx
from fastvlm_mlx.model.cpu.streams import Parts, Streams
from fastvlm_mlx.model.vision import DepthwiseConv, DoublingDepthwiseConv


def _tile(width: int) -> int:
    """How many outputs of a row share a window: the divisor of `width` nearest 16, the width of OpenBLAS's kernels.

    More multiply more zeros, and the matrices grow with the square.
    """
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(math.log(d / 16)))


def band_matrices(kernel: mx.array, tile: int, stride: int = 1) -> mx.array:
    """Matrices (k, C, 1, S, T) that turn windows of S inputs into T outputs, for each row of kernels (C, k, k).

    Column t holds the kernel's row after t·stride zeros: one step down reads one number further in the row between
    zeros, one step to the right `stride` less. They are stored as they are multiplied, since OpenBLAS then uses such
    small matrices where they are.
    """
    channels, kernel_size = kernel.shape[:2]
    zeros, window = (tile - 1) * stride, (tile - 1) * stride + kernel_size
    rows = mx.pad(kernel.swapaxes(0, 1), [(0, 0), (0, 0), (zeros, zeros)])
    length = rows.shape[2]
    shape, strides = (kernel_size, channels, 1, window, tile), (channels * length, length, 0, 1, -stride)
    return mx.contiguous(mx.as_strided(rows, shape, strides, zeros))


def windows_of(x: mx.array, kernel_size: int, tile: int, stride: int = 1) -> mx.array:
    """The windows (stride, C, B, n, S) of a padded (C, B, H, W), row after row, the rows sorted by their remainder."""
    pad = kernel_size // 2
    tiles, window = x.shape[3] // stride // tile, (tile - 1) * stride + kernel_size
    x = mx.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    channels, images, height, width = x.shape
    shape = (stride, channels, images, height // stride, tiles, window)
    strides = (width, images * height * width, height * width, stride * width, tile * stride, 1)
    return mx.as_strided(x, shape, strides).reshape(stride, channels, images, -1, window)


class BandedConv:
    """A k x k depthwise convolution on windows, as k batched matrix products."""

    def __init__(self, weight: mx.array, bias: mx.array | None, stride: int = 1) -> None:
        self.kernel = weight[..., 0]
        self.bias = None if bias is None else bias[:, None, None, None]
        self.stride = stride
        self._bands: dict[int, Parts] = {}

    def _bands_for(self, tile: int) -> Parts:
        if tile not in self._bands:
            self._bands[tile] = list(band_matrices(self.kernel, tile, self.stride))
        return self._bands[tile]

    def __call__(self, windows: mx.array, height: int, width: int) -> mx.array:
        """(C, B, height, width) from `windows_of` the input."""
        tile = (windows.shape[-1] - self.kernel.shape[1]) // self.stride + 1
        tiles, y = width // tile, self.bias
        for row, band in enumerate(self._bands_for(tile)):
            start = row // self.stride * tiles
            part = windows[row % self.stride, :, :, start : start + height * tiles]
            y = part @ band if y is None else mx.addmm(y, part, band)
        assert y is not None
        return y.reshape(*y.shape[:2], height, width)


class CPUDepthwiseConv:
    """`DepthwiseConv` on parts."""

    def __init__(self, conv: DepthwiseConv, streams: Streams) -> None:
        self._streams = streams
        weights = streams.split(conv.weight)
        biases = streams.split(conv.bias) if "bias" in conv else [None] * len(weights)
        self._convs = [BandedConv(w, b, conv.stride) for w, b in zip(weights, biases, strict=True)]

    def __call__(self, x: Parts) -> Parts:
        def run(conv: BandedConv, part: mx.array) -> mx.array:
            height, width = (side // conv.stride for side in part.shape[2:])
            return conv(windows_of(part, conv.kernel.shape[1], _tile(width), conv.stride), height, width)

        return self._streams.each(run, self._convs, x)


class CPUDoublingDepthwiseConv:
    """`DoublingDepthwiseConv` on parts: the even filters' parts, then the odd ones'."""

    def __init__(self, conv: DoublingDepthwiseConv, streams: Streams) -> None:
        self._streams = streams
        halves = zip(mx.split(conv.weight, 2), mx.split(conv.bias, 2), strict=True)
        even, odd = (list(zip(streams.split(weight), streams.split(bias), strict=True)) for weight, bias in halves)
        self._convs = [tuple(BandedConv(*half, conv.stride) for half in pair) for pair in zip(even, odd, strict=True)]

    def __call__(self, x: Parts, then: Callable[[mx.array], mx.array]) -> Parts:
        """`then` is applied to each part of the result."""

        def run(convs: tuple[BandedConv, ...], part: mx.array) -> Parts:
            stride, kernel_size = convs[0].stride, convs[0].kernel.shape[1]
            height, width = (side // stride for side in part.shape[2:])
            windows = windows_of(part, kernel_size, _tile(width), stride)
            return [then(conv(windows, height, width)) for conv in convs]

        pairs = self._streams.each(run, self._convs, x)
        return [part for half in zip(*pairs, strict=True) for part in half]
