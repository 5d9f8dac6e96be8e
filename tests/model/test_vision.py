"""The tower's own properties; its parity with upstream is in test_parity.py."""

import math

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import ActivationScales, VisionConfig
from fastvlm_mlx.model.cpu import vision as cpu_vision
from fastvlm_mlx.model.cpu.vision import CPUTower
from fastvlm_mlx.model.vision import DoublingDepthwiseConv, FastViTHD

DEPTHS = (1, 2, 1, 1, 1)
CONFIG = VisionConfig(
    embed_dims=(8, 16, 32, 64, 128), depths=DEPTHS, image_size=128, scales=ActivationScales.ones(DEPTHS)
)


def random_tower(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    tower = FastViTHD(config)

    def value(name, shape):
        fan_in = math.prod(shape[1:]) or 1
        return mx.array(rng.normal(0, fan_in**-0.5 if len(shape) > 1 else 0.1, shape), mx.float32)

    tower.update(tree_unflatten([(name, value(name, leaf.shape)) for name, leaf in tree_flatten(tower.parameters())]))
    return tower


@pytest.fixture(scope="module")
def tower():
    return random_tower()


def pixels(height, width, seed=1):
    return mx.array(np.random.default_rng(seed).random((1, height, width, 3)), mx.float32)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 192), (192, 128), (320, 64)])
def test_features_have_one_position_per_64_pixels(tower, height, width):
    assert tower(pixels(height, width)).shape == (1, height // 64, width // 64, 256)


def test_transposed_picture_and_kernels_give_transposed_features():
    tower, turned = random_tower(), random_tower()
    kernels = [(name, value) for name, value in tree_flatten(turned.parameters()) if value.ndim == 4]
    turned.update(tree_unflatten([(name, value.swapaxes(1, 2)) for name, value in kernels]))
    x = pixels(128, 192)
    # Equal but for the order of float32 sums: a height taken for a width would be off by its whole size.
    np.testing.assert_allclose(
        turned(x.swapaxes(1, 2)).swapaxes(1, 2), tower(x), rtol=0, atol=1e-5 * float(mx.abs(tower(x)).max())
    )


def test_rows_of_a_batch_do_not_see_each_other(tower):
    x = mx.concatenate([pixels(128, 128, 1), pixels(128, 128, 2)])
    alone = mx.concatenate([tower(x[:1]), tower(x[1:])])
    np.testing.assert_allclose(tower(x), alone, rtol=0, atol=1e-5 * float(mx.abs(alone).max()))


def test_doubling_convolution_is_a_grouped_one_with_its_filters_sorted():
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(12, 7, 7, 1)), mx.float32)
    x = mx.array(rng.normal(size=(1, 10, 14, 6)), mx.float32)
    grouped = mx.conv2d(x, weight, stride=2, padding=3, groups=6)
    order = mx.array([*range(0, 12, 2), *range(1, 12, 2)])
    conv = DoublingDepthwiseConv(6, 7, stride=2)
    conv.weight = weight[order]
    np.testing.assert_allclose(conv(x), grouped[..., order], rtol=1e-5, atol=1e-5)


def test_peaks_are_those_of_the_forward_pass(tower):
    x = pixels(128, 64)
    peaks = tower.activation_peaks(x)
    assert float(peaks["conv_exp"]) == pytest.approx(float(mx.abs(tower(x)).max()), rel=1e-5)
    blocks = sum(DEPTHS[:3]) * 5 + sum(DEPTHS[3:]) * 6
    assert len(peaks) == 3 + 4 * 2 + 2 + blocks + 2
    assert all(math.isfinite(float(peak)) and float(peak) > 0 for peak in peaks.values())


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 192), (320, 128), (704, 64)])
def test_cpu_formulation_equals_the_modules(tower, height, width, threads):
    x = pixels(height, width)
    expected = tower(x)
    # Sums of float32 products in another order, through five stages.
    tolerance = 2e-5 * float(mx.abs(expected).max())
    np.testing.assert_allclose(CPUTower(tower, threads)(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(128, 192), (320, 128)])
def test_cpu_formulation_computes_the_same_in_small_blocks(tower, height, width, threads, monkeypatch):
    x = mx.concatenate([pixels(height, width), pixels(height, width)[:, ::-1]])
    expected = CPUTower(tower, threads)(x)
    mx.eval(expected)
    monkeypatch.setattr(cpu_vision, "_HIDDEN", 1)  # 256 positions at a time, the last block smaller
    monkeypatch.setattr(cpu_vision, "_SCORES", 1)  # one head at a time
    # BLAS sums in another order for products of another size.
    tolerance = 1e-5 * float(mx.abs(expected).max())
    np.testing.assert_allclose(CPUTower(tower, threads)(x), expected, rtol=0, atol=tolerance)
