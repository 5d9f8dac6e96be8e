"""Error compensation: MLX's packing, and a smaller error of the output than rounding to nearest has."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.convert.quantize.gptq import compensated, pack
from fastvlm_mlx.convert.quantize.scheme import LayerScheme


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_levels_are_packed_as_mlx_does(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(0, 2**bits, (5, 64)).astype(np.uint8)
    scales, biases = mx.ones((5, 2)), mx.zeros((5, 2))
    unpacked = mx.dequantize(mx.array(pack(levels, bits)), scales, biases, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(unpacked), levels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compensation_halves_the_error_of_the_output_on_correlated_inputs(dtype: str) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(48, 256)).astype(np.float32)
    mixture = random.normal(size=(512, 32)) @ random.normal(size=(32, 256))
    inputs = (mixture + 0.1 * random.normal(size=mixture.shape)).astype(np.float32)
    packed, rounded = compensated(
        weight, (inputs.T @ inputs).astype(np.float64), LayerScheme(group_size=64, bits=4), dtype
    )
    parts = {name: mx.array(value) for name, value in packed.items()}
    if dtype == "bfloat16":
        parts |= {name: parts[name].view(mx.bfloat16) for name in ("scales", "biases")}
    wide = [parts[name].astype(mx.float32) for name in ("scales", "biases")]
    stands_for = np.array(mx.dequantize(parts["weight"], *wide, group_size=64, bits=4))
    np.testing.assert_allclose(stands_for, rounded, atol=1e-6)
    nearest = np.array(mx.dequantize(*mx.quantize(mx.array(weight), 64, 4), 64, 4))
    error, plain = (np.linalg.norm(inputs @ (weight - other).T) for other in (stands_for, nearest))
    assert error < plain / 2


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    hessian = np.zeros((64, 64))
    _, rounded = compensated(weight, hessian, LayerScheme(group_size=32, bits=8), "float32")
    np.testing.assert_allclose(rounded, weight, atol=0.02)


def test_a_constant_group_is_kept_exactly() -> None:
    _, rounded = compensated(
        np.full((3, 32), 0.75, np.float32), np.eye(32), LayerScheme(group_size=32, bits=4), "float16"
    )
    np.testing.assert_array_equal(rounded, 0.75)
