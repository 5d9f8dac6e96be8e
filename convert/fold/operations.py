"""Folds the train-time form of a FastViTHD into its inference form: pure functions on float32 arrays.

Kernels are channels-last, (O, k, k, I) with I input channels per group; linear weights are (O, I). The train-time
blocks are those of MobileOne (arXiv 2206.04040), FastViT (arXiv 2303.14189) and RepLKNet (arXiv 2203.06717). Every fold
here is exact: only rounding differs.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.convert.arrays import Array

BATCH_NORM_EPS = 1e-5
"""PyTorch's default, which no block of FastViTHD overrides."""


class Affine(NamedTuple):
    """A convolution or a linear layer."""

    weight: Array
    bias: Array


class BatchNorm(NamedTuple):
    """The parameters and the statistics of a BatchNorm over C channels, each (C,)."""

    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array

    def affine(self) -> tuple[Array, Array]:
        """The factor and the offset that it applies in inference, each (C,)."""
        factor = self.weight / np.sqrt(self.running_var + np.float32(BATCH_NORM_EPS))
        return factor, self.bias - self.running_mean * factor


def batch_norm(kernel: Array, norm: BatchNorm) -> Affine:
    """The convolution that equals `kernel` (without a bias) followed by `norm`."""
    factor, offset = norm.affine()
    return Affine(kernel * factor[:, None, None, None], offset)


def identity_kernel(channels: int, size: int, per_group: int) -> Array:
    """The (C, size, size, per_group) kernel of a convolution that returns its input."""
    kernel = np.zeros((channels, size, size, per_group), np.float32)
    outputs = np.arange(channels)
    kernel[outputs, size // 2, size // 2, outputs % per_group] = 1
    return kernel


def branches(convolutions: Iterable[Affine]) -> Affine:
    """One convolution that equals the sum of parallel ones; smaller kernels are centred in the largest."""
    summands = list(convolutions)
    size = max(weight.shape[1] for weight, _ in summands)
    weight = np.zeros((summands[0].weight.shape[0], size, size, summands[0].weight.shape[3]), np.float32)
    for summand in summands:
        margin = (size - summand.weight.shape[1]) // 2
        weight[:, margin : size - margin, margin : size - margin] += summand.weight
    return Affine(weight, np.sum([bias for _, bias in summands], axis=0))


def rep_mixer(mixer: Affine, norm: BatchNorm, layer_scale: Array) -> Affine:
    """The depthwise convolution that equals `x + layer_scale * (mixer(x) - norm(x))`."""
    channels, size, _, per_group = mixer.weight.shape
    identity = identity_kernel(channels, size, per_group)
    skipped = batch_norm(identity, norm)
    weight = identity + layer_scale[:, None, None, None] * (mixer.weight - skipped.weight)
    return Affine(weight, layer_scale * (mixer.bias - skipped.bias))


def rep_cpe(encoding: Affine) -> Affine:
    """The depthwise convolution that equals `x + encoding(x)`, FastViT's conditional positional encoding."""
    channels, size, _, per_group = encoding.weight.shape
    return Affine(encoding.weight + identity_kernel(channels, size, per_group), encoding.bias)


def bias_through(bias: Array, linear: Affine) -> Affine:
    """The linear layer that equals adding `bias` to the input of `linear`.

    Exact for a 1x1 convolution only: a larger one would see the bias's absence in its zero padding.
    """
    return Affine(linear.weight, linear.bias + linear.weight @ bias)


def layer_scale(linear: Affine, gamma: Array) -> Affine:
    """The linear layer that equals `gamma * linear(x)`."""
    return Affine(linear.weight * gamma[:, None], linear.bias * gamma)


def pointwise(convolution: Affine) -> Affine:
    """The linear layer that equals a 1x1 convolution."""
    return Affine(convolution.weight[:, 0, 0, :], convolution.bias)


def even_odd(channels: int) -> npt.NDArray[np.intp]:
    """The order of outputs that makes a grouped convolution with two filters per input channel two depthwise ones."""
    return np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])
