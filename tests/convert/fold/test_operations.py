"""Folded equals unfolded, for every fold, against sums written out as loops."""

import numpy as np
import numpy.typing as npt
import pytest

from fastvlm_mlx.convert.fold import operations as fold
from fastvlm_mlx.convert.fold.operations import Affine, BatchNorm

Array = npt.NDArray[np.float32]


def convolve(x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1) -> Array:
    """A zero-padded grouped convolution, one output value at a time: (H, W, C) -> (H/stride, W/stride, O)."""
    outputs, size, _, per_group = kernel.shape
    groups = x.shape[2] // per_group
    padded = np.pad(x, ((size // 2, size // 2), (size // 2, size // 2), (0, 0))).astype(np.float64)
    height, width = (-(-side // stride) for side in x.shape[:2])
    out = np.zeros((height, width, outputs))
    for row in range(height):
        for column in range(width):
            window = padded[row * stride : row * stride + size, column * stride : column * stride + size]
            for output in range(outputs):
                first = output // (outputs // groups) * per_group
                out[row, column, output] = np.sum(window[:, :, first : first + per_group] * kernel[output])
    return (out if bias is None else out + bias).astype(np.float32)


def normalise(x: Array, norm: BatchNorm) -> Array:
    return (x - norm.running_mean) / np.sqrt(norm.running_var + 1e-5) * norm.weight + norm.bias


class Draw:
    """Random parameters."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def array(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape).astype(np.float32)

    def norm(self, channels: int) -> BatchNorm:
        variance = self.generator.uniform(0.1, 3, channels).astype(np.float32)
        return BatchNorm(self.array(channels), self.array(channels), self.array(channels), variance)


@pytest.fixture
def draw() -> Draw:
    return Draw()


def assert_close(actual: Array, expected: Array) -> None:
    """Within float32's rounding, relative to the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_batch_norm_folds_into_the_convolution_before_it(draw: Draw) -> None:
    x, kernel, norm = draw.array(5, 7, 4), draw.array(4, 3, 3, 1), draw.norm(4)
    assert_close(convolve(x, *fold.batch_norm(kernel, norm)), normalise(convolve(x, kernel), norm))


@pytest.mark.parametrize("per_group", [1, 2, 6])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_identity_kernel_returns_its_input(draw: Draw, size: int, per_group: int) -> None:
    x = draw.array(4, 5, 6)
    np.testing.assert_array_equal(convolve(x, fold.identity_kernel(6, size, per_group)), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mobile_one_block_folds_into_one_convolution(draw: Draw, stride: int) -> None:
    x, kernel, pointwise = draw.array(6, 9, 4), draw.array(4, 3, 3, 2), draw.array(4, 1, 1, 2)
    norms = [draw.norm(4) for _ in range(3)]
    branches = [fold.batch_norm(kernel, norms[0]), fold.batch_norm(pointwise, norms[1])]
    expected = sum(
        normalise(convolve(x, weight, stride=stride), norm)
        for weight, norm in zip((kernel, pointwise), norms, strict=False)
    )
    if stride == 1:
        branches.append(fold.batch_norm(fold.identity_kernel(4, 3, 2), norms[2]))
        expected += normalise(x, norms[2])
    assert_close(convolve(x, *fold.branches(branches), stride=stride), np.asarray(expected))


def test_a_large_and_a_small_kernel_fold_into_one(draw: Draw) -> None:
    x, large, small = draw.array(9, 6, 2), draw.array(4, 7, 7, 1), draw.array(4, 3, 3, 1)
    norms = [draw.norm(4), draw.norm(4)]
    merged = fold.branches([fold.batch_norm(small, norms[1]), fold.batch_norm(large, norms[0])])
    expected = normalise(convolve(x, large, stride=2), norms[0]) + normalise(convolve(x, small, stride=2), norms[1])
    assert merged.weight.shape == (4, 7, 7, 1)
    assert_close(convolve(x, *merged, stride=2), expected)


def test_a_rep_mixer_folds_into_one_convolution(draw: Draw) -> None:
    x, mixer, norm, gamma = (
        draw.array(5, 8, 3),
        Affine(draw.array(3, 3, 3, 1), draw.array(3)),
        draw.norm(3),
        draw.array(3),
    )
    expected = x + gamma * (convolve(x, *mixer) - normalise(x, norm))
    assert_close(convolve(x, *fold.rep_mixer(mixer, norm, gamma)), expected)


def test_a_conditional_positional_encoding_folds_into_one_convolution(draw: Draw) -> None:
    x, encoding = draw.array(4, 9, 3), Affine(draw.array(3, 7, 7, 1), draw.array(3))
    assert_close(convolve(x, *fold.rep_cpe(encoding)), x + convolve(x, *encoding))


def test_a_bias_goes_through_a_linear_layer(draw: Draw) -> None:
    x, bias, linear = draw.array(10, 4), draw.array(4), Affine(draw.array(6, 4), draw.array(6))
    weight, offset = fold.bias_through(bias, linear)
    assert_close(x @ weight.T + offset, (x + bias) @ linear.weight.T + linear.bias)


def test_a_layer_scale_folds_into_the_linear_layer_before_it(draw: Draw) -> None:
    x, gamma, linear = draw.array(10, 4), draw.array(6), Affine(draw.array(6, 4), draw.array(6))
    weight, bias = fold.layer_scale(linear, gamma)
    assert_close(x @ weight.T + bias, gamma * (x @ linear.weight.T + linear.bias))


def test_a_pointwise_convolution_is_a_linear_layer(draw: Draw) -> None:
    x, convolution = draw.array(3, 5, 4), Affine(draw.array(6, 1, 1, 4), draw.array(6))
    weight, bias = fold.pointwise(convolution)
    assert_close(x @ weight.T + bias, convolve(x, *convolution))


def test_two_filters_per_channel_become_two_depthwise_convolutions(draw: Draw) -> None:
    x, kernel, bias = draw.array(6, 5, 3), draw.array(6, 3, 3, 1), draw.array(6)
    following = draw.array(4, 6)
    order = fold.even_odd(6)
    halves = zip(np.split(kernel[order], 2), np.split(bias[order], 2), strict=True)
    depthwise = np.concatenate([convolve(x, weight, offset) for weight, offset in halves], axis=-1)
    grouped = convolve(x, kernel, bias)
    np.testing.assert_array_equal(depthwise, grouped[..., order])
    assert_close(depthwise @ following[:, order].T, grouped @ following.T)
