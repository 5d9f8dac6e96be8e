"""Both formulations of every function that has one per device: equal to each other and to the definition."""

import math

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.model import activations, language
from fastvlm_mlx.model.activations import exp_below, gelu, swiglu
from fastvlm_mlx.model.language import attention

Z = np.concatenate([np.linspace(-30, 30, 60001), [-1e4, -1e3, 0.0, 1e3, 1e4]])
PHI = 0.5 * (1 + np.vectorize(math.erf)(Z * math.sqrt(0.5)))


@pytest.fixture(params=["cpu", "gpu"])
def formulation(request, monkeypatch):
    """Runs the formulation that is meant for a device, on the device at hand."""
    monkeypatch.setattr(activations, "device", lambda: request.param)
    monkeypatch.setattr(language, "device", lambda: request.param)
    return request.param


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gelu_is_the_exact_one_divided_by_its_scale(formulation, scale):
    got = np.asarray(gelu(mx.array(Z / scale, mx.float32), scale)) * scale
    # The approximation is good to 4e-7; float32 rounds |z| at 6e-8 of itself, a few times over.
    np.testing.assert_allclose(got, Z * PHI, rtol=3e-7, atol=1e-6)


def test_gelu_of_half_precision_is_rounded_once(formulation):
    x = mx.array(np.linspace(-6, 6, 1001), mx.float16)
    assert mx.array_equal(gelu(x), gelu(x.astype(mx.float32)).astype(x.dtype))


def test_swiglu_is_silu_of_the_gate_times_the_other(formulation):
    gate, up = mx.array(Z, mx.float32), mx.array(np.cos(Z), mx.float32)
    expected = Z / (1 + np.exp(-np.maximum(Z, -700))) * np.cos(Z)
    # silu to 1.2e-6 by the fit, times at most 1, plus float32's own rounding of the arguments.
    np.testing.assert_allclose(swiglu(gate, up), expected, rtol=1e-6, atol=2e-6)


def test_exponential_below_its_limit():
    """To 2e-6: three squarings make eight of each rounding."""
    x = np.linspace(-200, 5, 40001)
    got = exp_below(mx.array(x, mx.float32), mx.array(5.0))
    np.testing.assert_allclose(got, np.exp(x - 5), rtol=0, atol=2e-6)
    assert float(exp_below(mx.array([5.0]), mx.array(5.0)).item()) == 1.0
    assert float(exp_below(mx.array([-1e6]), mx.array(5.0)).item()) == 0.0


def masks(batch, length, total):
    causal = np.tril(np.ones((length, total), bool), total - length)
    return {"none": None, "causal": "causal", "array": mx.array(np.broadcast_to(causal, (batch, 1, length, total)))}


@pytest.mark.parametrize("mask", ["none", "causal", "array"])
@pytest.mark.parametrize(("length", "total"), [(1, 9), (7, 7), (5, 12)])
def test_attention_is_softmax_of_the_scores(formulation, mask, length, total):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(0, 2, (2, heads, n, 16)) for heads, n in ((6, length), (2, total), (2, total)))
    chosen = masks(2, length, total)[mask]
    got = attention(*(mx.array(x, mx.float32) for x in (q, k, v)), chosen)
    scores = q @ np.repeat(k, 3, axis=1).swapaxes(2, 3) / 4
    if mask != "none":
        scores = np.where(np.tril(np.ones((length, total), bool), total - length), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 3, axis=1)
    # The exponential to 1e-6, summed over up to twelve values of magnitude 2.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
