"""FastViTHD's forward pass in the form that MLX's CPU backend runs fastest, with the same weights and result.

It differs from `FastViTHD.__call__` in two ways, each for a measured reason:

- Channels first, (C, B, H, W). A depthwise convolution is then a sum of k batched matrix products, one per kernel row,
  with banded matrices: T outputs of a row need S = (T - 1)·stride + k inputs, and an (S, T) matrix with the kernel's
  row along its diagonal maps one to the other. MLX's own depthwise convolution is a scalar loop here, tens of times
  slower.
- A CPU stream of MLX is one thread. The channels of depthwise convolutions, the heads of attention and the hidden units
  of ConvFFNs are independent, so a feature map is kept as parts (C/P, B, H, W), one per stream, which only meet where a
  linear reads all channels.

The images of a batch share each read of the weights, which takes longer than their arithmetic at 256 px.
"""

import functools
import math
from collections.abc import Callable

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.model.activations import exp_below, gelu
from fastvlm_mlx.model.cpu.streams import Parts, Streams
from fastvlm_mlx.model.vision import (
    Attention,
    AttentionBlock,
    ConvExp,
    ConvFFN,
    DepthwiseConv,
    DoublingDepthwiseConv,
    FastViTHD,
    PatchEmbed,
    RepMixerBlock,
    Stage,
)

_STRIP = 32
"""Rows of a matrix that are transposed at once."""


def _tile(width: int) -> int:
    """How many outputs of a row share a window: the divisor of `width` nearest 8.

    More would suit BLAS kernels better, but multiply more zeros, and the matrices grow with the square.
    """
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(math.log(d / 8)))


def band_matrices(rows: mx.array, tile: int, stride: int = 1) -> mx.array:
    """Matrices (C, S, T) that turn windows of S inputs into T outputs, from one kernel row (C, k) per channel.

    Transposed, row t holds the kernel row after t·stride zeros: all rows are one sequence of period S + stride.
    """
    channels, kernel_size = rows.shape
    window = (tile - 1) * stride + kernel_size
    period = mx.pad(rows, [(0, 0), (0, window + stride - kernel_size)])
    repeated = mx.broadcast_to(period[:, None], (channels, tile, window + stride)).reshape(channels, -1)
    return repeated[:, : tile * window].reshape(channels, tile, window).swapaxes(1, 2)


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
            rows = range(self.kernel.shape[1])
            self._bands[tile] = [band_matrices(self.kernel[:, row], tile, self.stride)[:, None] for row in rows]
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


def _whole(x: Parts) -> mx.array:
    """(C, B·H·W) of all channels."""
    return mx.concatenate([part.reshape(part.shape[0], -1) for part in x])


class LinearGELU:
    """A linear over channels and its GELU; each stream computes a part of the outputs from the whole input."""

    def __init__(self, linear: nn.Module, scale: float, streams: Streams) -> None:
        self._streams, self._scale = streams, scale
        self._weights, self._biases = streams.split(linear.weight), streams.split(linear.bias[:, None])

    def __call__(self, x: Parts) -> Parts:
        size, whole = x[0].shape[1:], _whole(x)

        def run(weight: mx.array, bias: mx.array) -> mx.array:
            return gelu(mx.addmm(bias, weight, whole), self._scale).reshape(-1, *size)

        return self._streams.each(run, self._weights, self._biases)


@mx.compile
def _residual(x: mx.array, bias: mx.array, *branches: mx.array) -> mx.array:
    return sum(branches, x + bias)


class CPUConvFFN:
    """`x + ConvFFN(x)`: each stream runs a part of the hidden units, whose contributions are then added up."""

    def __init__(self, ffn: ConvFFN, streams: Streams) -> None:
        self._streams, self._scale = streams, ffn.hidden_scale
        self._conv = CPUDepthwiseConv(ffn.conv, streams)
        self._fc1, self._bias1 = streams.split(ffn.fc1.weight), streams.split(ffn.fc1.bias[:, None])
        self._fc2, self._bias2 = streams.split(ffn.fc2.weight.T), streams.split(ffn.fc2.bias[:, None, None, None])

    def __call__(self, x: Parts) -> Parts:
        whole, size = _whole(self._conv(x)), x[0].shape[1:]

        def hidden(fc1: mx.array, bias: mx.array, fc2: mx.array) -> mx.array:
            return fc2.T @ gelu(mx.addmm(bias, fc1, whole), self._scale)

        sums = [
            self._streams.split(y.reshape(-1, *size))
            for y in self._streams.each(hidden, self._fc1, self._bias1, self._fc2)
        ]
        return self._streams.each(_residual, x, self._bias2, *sums)


class CPUAttention:
    """`x + Attention(norm(x))`: each stream runs a part of the heads, then a part of the projection's outputs."""

    def __init__(self, norm: nn.LayerNorm, attention: Attention, streams: Streams) -> None:
        self._streams, self._norm, self._head_dim = streams, norm, attention.head_dim
        self._qkv = [streams.split(weight) for weight in mx.split(attention.qkv.weight, 3)]
        self._proj = streams.split(attention.proj.weight)
        self._bias = streams.split(attention.proj.bias[:, None, None, None])

    def __call__(self, x: Parts) -> Parts:
        normed: mx.array = self._norm(_whole(x).T).T
        size = x[0].shape[1:]

        def heads(*qkv: mx.array) -> mx.array:
            q, k, v = (self._by_head(weight @ normed, size[0]) for weight in qkv)
            scores = k.swapaxes(2, 3) @ (q * self._head_dim**-0.5)  # keys down, queries across
            weights = exp_below(scores, scores.max(axis=2, keepdims=True))
            attended = (v @ weights) / weights.sum(axis=2, keepdims=True)
            return attended.swapaxes(1, 2).reshape(-1, normed.shape[1])

        attended = mx.concatenate(self._streams.each(heads, *self._qkv))

        def project(part: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
            summed: mx.array = _residual(part, bias, (weight @ attended).reshape(-1, *size))
            return summed

        return self._streams.each(project, x, self._proj, self._bias)

    def _by_head(self, x: mx.array, images: int) -> mx.array:
        """(heads, B, head_dim, H·W) of (C, B·H·W)."""
        return x.reshape(-1, self._head_dim, images, x.shape[1] // images).swapaxes(1, 2)


class CPUStem:
    """The three layers before stage 0: images (B, H, W, 3) to parts (C/P, B, H/4, W/4)."""

    def __init__(self, tower: FastViTHD, streams: Streams) -> None:
        first, second, third = tower.stem
        self._streams, self._scales = streams, tower.stem_scales
        self._first = streams.split(first.weight.reshape(first.weight.shape[0], -1))
        self._bias = streams.split(first.bias[:, None])
        self._second = CPUDepthwiseConv(second, streams)
        self._third = LinearGELU(third, tower.stem_scales[2], streams)

    def __call__(self, images: mx.array) -> Parts:
        count, height, width = images.shape[0], images.shape[1] // 2, images.shape[2] // 2
        images = mx.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
        row, whole = images.shape[2] * 3, images.shape[1] * images.shape[2] * 3
        shape, strides = (3, 9, count, height, width), (row, 1, whole, 2 * row, 6)
        patches = mx.as_strided(images, shape, strides).reshape(27, -1)

        def run(weight: mx.array, bias: mx.array) -> mx.array:
            return gelu(mx.addmm(bias, weight, patches), self._scales[0]).reshape(-1, count, height, width)

        x = self._second(self._streams.each(run, self._first, self._bias))
        return self._third(self._streams.each(lambda part: gelu(part, self._scales[1]), x))


class CPUPatchEmbed:
    """`PatchEmbed` on parts."""

    def __init__(self, patch_embed: PatchEmbed, streams: Streams) -> None:
        self._scale = patch_embed.scales[0]
        self._conv = CPUDoublingDepthwiseConv(patch_embed.conv, streams)
        self._proj = LinearGELU(patch_embed.proj, patch_embed.scales[1], streams)

    def __call__(self, x: Parts) -> Parts:
        return self._proj(self._conv(x, lambda part: gelu(part, self._scale)))


class CPUConvExp:
    """`ConvExp` on parts: to features (B, H, W, C)."""

    def __init__(self, conv_exp: ConvExp, streams: Streams) -> None:
        self._conv = CPUDoublingDepthwiseConv(conv_exp.conv, streams)
        self._se, self._scale = conv_exp.se, conv_exp.scale

    def __call__(self, x: Parts) -> mx.array:
        y = mx.concatenate(self._conv(x, lambda part: part)).transpose(1, 2, 3, 0)
        return gelu(y * self._se(y), self._scale)


def _stage_layers(stage: Stage, streams: Streams) -> list[Callable[[Parts], Parts]]:
    layers: list[Callable[[Parts], Parts]] = []
    if "downsample" in stage:
        layers.append(CPUPatchEmbed(stage.downsample, streams))
    if "cpe" in stage:
        layers.append(CPUDepthwiseConv(stage.cpe, streams))
    for block in stage.blocks:
        if isinstance(block, RepMixerBlock):
            layers += [CPUDepthwiseConv(block.token_mixer, streams), CPUConvFFN(block.conv_ffn, streams)]
        elif isinstance(block, AttentionBlock):
            layers += [CPUAttention(block.norm, block.token_mixer, streams), CPUConvFFN(block.conv_ffn, streams)]
    return layers


def is_by_hidden_unit(name: str) -> bool:
    """Whether a weight of a model is one that `store_by_hidden_unit` lays out by its inputs."""
    return name.startswith("vision_tower.") and name.endswith(".conv_ffn.fc2.weight")


def by_inputs(weight: mx.array) -> mx.array:
    """A matrix (out, in), laid out by its inputs; strips of its rows stay in the cache while they are turned."""
    count, rest = divmod(weight.shape[0], _STRIP)
    strips = mx.split(weight, count) if count and not rest else [weight]
    return mx.concatenate([strip.T for strip in strips], axis=1).T


def store_by_hidden_unit(tower: FastViTHD) -> None:
    """Lays out the second linear of each ConvFFN by its inputs, in place.

    A part of the hidden units is then contiguous, which MLX's matrix product would otherwise have to copy.
    """
    streams = Streams(cpu_threads())
    for stage in tower.stages:
        for block in stage.blocks:
            with streams.next():
                block.conv_ffn.fc2.weight = mx.contiguous(block.conv_ffn.fc2.weight.T).T


class CPUTower:
    """A `FastViTHD` arranged for the CPU: pixel values (B, H, W, 3) -> features (B, H/64, W/64, C).

    Args:
        tower: Shares its weights, which are not quantized; faster after `store_by_hidden_unit`.
        threads: At most so many, by default one per core up to four; as many as the narrowest layer can be divided
            among.
    """

    def __init__(self, tower: FastViTHD, threads: int | None = None) -> None:
        attention = tower.stages[3].blocks[0].token_mixer
        heads = attention.proj.bias.size // attention.head_dim
        parts = math.gcd(heads, tower.stem[0].bias.size)
        streams = Streams(max(n for n in range(1, (threads or cpu_threads()) + 1) if parts % n == 0))
        self._streams = streams
        self._stem = CPUStem(tower, streams)
        self._stages = [_stage_layers(stage, streams) for stage in tower.stages]
        self._conv_exp = CPUConvExp(tower.conv_exp, streams)

    def __call__(self, x: mx.array) -> mx.array:
        parts = self._stem(x)
        for stage in self._stages:
            parts = _through(stage, parts)
        return self._conv_exp(parts)

    def segments(self) -> dict[str, Callable[[mx.array], mx.array]]:
        """What `FastViTHD.segments` returns, in the form for the CPU."""
        streams = self._streams

        def parts(x: mx.array) -> Parts:
            return streams.split(mx.contiguous(x.transpose(3, 0, 1, 2)))

        def whole(x: Parts) -> mx.array:
            return mx.concatenate(x).transpose(1, 2, 3, 0)

        def run_stage(layers: list[Callable[[Parts], Parts]], x: mx.array) -> mx.array:
            return whole(_through(layers, parts(x)))

        stages = {f"stages.{index}": functools.partial(run_stage, layers) for index, layers in enumerate(self._stages)}
        return {
            "stem": lambda x: whole(self._stem(x)),
            **stages,
            "conv_exp": lambda x: self._conv_exp(parts(x)),
        }


def _through(layers: list[Callable[[Parts], Parts]], x: Parts) -> Parts:
    for layer in layers:
        x = layer(x)
    return x
