"""FastViTHD's forward pass in the form that MLX's CPU backend runs fastest, with the same weights and result.

It differs from `FastViTHD.__call__` in three ways, each for a measured reason:

- Channels first, (C, B, H, W), so that depthwise convolutions are matrix products (see `depthwise`).
- A CPU stream of MLX is one thread. The channels of depthwise convolutions, the heads of attention and the hidden units
  of ConvFFNs are independent, so a feature map is kept as parts (C/P, B, H, W), one per stream, which only meet where a
  linear reads all channels.
- What is only needed between two products, hidden units and the scores of attention, is computed block by block. A
  block stays in the cache of a core, and its memory is used again for the next: 1024 px touched 420,000 fresh pages,
  and touch 170,000.

The images of a batch share each read of the weights, which takes longer than their arithmetic at 256 px.
"""

import functools
import math
from collections.abc import Callable

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.model.activations import exp_below, gelu
from fastvlm_mlx.model.cpu.depthwise import CPUDepthwiseConv, CPUDoublingDepthwiseConv
from fastvlm_mlx.model.cpu.streams import Parts, Streams, after
from fastvlm_mlx.model.vision import (
    Attention,
    AttentionBlock,
    ConvExp,
    ConvFFN,
    FastViTHD,
    PatchEmbed,
    RepMixerBlock,
    Stage,
)

_STRIP = 32
"""Rows of a matrix that are transposed at once."""


def _by_position(part: mx.array) -> mx.array:
    """(C/P, B·H·W) of a part."""
    return part.reshape(part.shape[0], -1)


def _whole(x: Parts) -> mx.array:
    """(C, B·H·W) of all channels."""
    return mx.concatenate([_by_position(part) for part in x])


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


_HIDDEN = 2**19
"""Hidden units times positions of a block, for one stream: 2 MB."""

_SCORES = 2**20
"""Scores of attention in a block, for one stream: 4 MB."""


@mx.compile
def _residual(x: mx.array, bias: mx.array, *branches: mx.array) -> mx.array:
    return sum(branches, x + bias)


class CPUConvFFN:
    """`x + ConvFFN(x)`: each stream runs a part of the hidden units, whose contributions are then added up."""

    def __init__(self, ffn: ConvFFN, streams: Streams) -> None:
        self._streams, self._scale = streams, ffn.hidden_scale
        self._conv = CPUDepthwiseConv(ffn.conv, streams)
        self._fc1, self._bias1 = streams.split(ffn.fc1.weight), streams.split(ffn.fc1.bias[:, None])
        self._fc2, self._bias2 = streams.split(ffn.fc2.weight.T), streams.split(ffn.fc2.bias[:, None])

    def __call__(self, x: Parts) -> Parts:
        size = x[0].shape[1:]
        mixed = [_by_position(part) for part in self._conv(x)]
        x = [_by_position(part) for part in x]
        step = max(_HIDDEN // self._fc1[0].shape[0] // 256, 1) * 256
        sums: Parts = []
        blocks: list[Parts] = []
        for first in range(0, x[0].shape[1], step):
            here = slice(first, first + step)
            sums = self._sums([part[:, here] for part in mixed], sums)
            shares = [self._streams.split(y) for y in sums]
            blocks.append(self._streams.each(_residual, [part[:, here] for part in x], self._bias2, *shares))
        return self._streams.each(lambda *parts: mx.concatenate(list(parts), axis=1).reshape(-1, *size), *blocks)

    def _sums(self, mixed: Parts, before: Parts) -> Parts:
        """What each stream's hidden units add (C, n) at n positions, computed after `before`."""
        with self._streams.next():
            whole = mx.concatenate(mixed)

        def hidden(fc1: mx.array, bias: mx.array, fc2: mx.array, *before: mx.array) -> mx.array:
            return fc2.T @ gelu(mx.addmm(bias, fc1, after(whole, *before)), self._scale)

        return self._streams.each(hidden, self._fc1, self._bias1, self._fc2, *([before] if before else []))


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
            step = max(_SCORES // (size[0] * q.shape[3] ** 2), 1)
            blocks: list[mx.array] = []
            for first in range(0, len(q), step):
                here = slice(first, first + step)
                queries = after(q[here] * self._head_dim**-0.5, *blocks[-1:])
                scores = k[here].swapaxes(2, 3) @ queries  # keys down, queries across
                weights = exp_below(scores, scores.max(axis=2, keepdims=True))
                blocks.append((v[here] @ weights) / weights.sum(axis=2, keepdims=True))
            attended = mx.concatenate(blocks)
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
