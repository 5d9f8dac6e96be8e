"""Casting changes no number."""

from collections.abc import Callable

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.casting import cast_on_streams, widened
from fastvlm_mlx.streams import worker_streams


def every_float16() -> np.ndarray:
    return np.arange(2**16).astype(np.uint16).view(np.float16)


@pytest.mark.parametrize("prepare", [mx.enable_compile, mx.disable_compile])
def test_every_float16_is_the_same_number_in_float32(
    prepare: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(mx.enable_compile)
    prepare()
    halves = every_float16()
    floats = np.asarray(widened(mx.array(halves)))
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, halves)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(floats), np.signbit(halves))


@pytest.mark.parametrize("rows", [0, 5, 32, 96])
def test_a_weight_that_is_laid_out_by_hidden_unit_has_the_same_numbers(rows: int) -> None:
    name = "vision_tower.stages.0.blocks.0.conv_ffn.fc2.weight"
    stored = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float16)
    streams = worker_streams(2)
    cast = cast_on_streams([{name: mx.array(stored)} for _ in streams], streams, mx.float32)[name]
    np.testing.assert_array_equal(np.asarray(cast), stored)


def test_integers_stay_what_they_are() -> None:
    stored = np.arange(6, dtype=np.uint32)
    (stream,) = worker_streams(1)
    cast = cast_on_streams([{"codes": mx.array(stored)}], [stream], mx.float32)["codes"]
    assert cast.dtype == mx.uint32
    np.testing.assert_array_equal(np.asarray(cast), stored)
