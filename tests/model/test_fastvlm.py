"""The model takes pixel values as the processor makes them, and refuses others."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.errors import ConfigError

BYTES = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)


def test_bytes_and_floats_give_the_same_visual_tokens(loaded):
    model, _ = loaded
    expected = np.asarray(model.encode_image(BYTES))
    for floats in (BYTES.astype(np.float32) / 255, mx.array(BYTES).astype(mx.float32) / 255):
        np.testing.assert_array_equal(np.asarray(model.encode_image(floats)), expected)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (BYTES.astype(np.int64), r"must be uint8, or float in \[0, 1\], not int64"),
        (mx.array(BYTES).astype(mx.int32), "not int32"),
        (BYTES > 127, "not bool"),
        (BYTES.astype(np.float32), r"float pixel_values must be in \[0, 1\], not \[0, 255\]; divide or clip them"),
        (BYTES / np.float32(127.5) - 1, r"not \[-1, 1\]"),
        (mx.full((1, 64, 64, 3), float("nan")), r"not \[nan, nan\]"),
        (BYTES[0], r"must be \(B, R, R, 3\) with R a multiple of 64, not \(64, 64, 3\)"),
        (BYTES[:, :60], r"not \(1, 60, 64, 3\)"),
        (BYTES.transpose(0, 3, 1, 2), r"not \(1, 3, 64, 64\)"),
    ],
)
def test_pixel_values_of_another_kind_are_refused(loaded, pixel_values, message):
    model, _ = loaded
    with pytest.raises(ConfigError, match=message):
        model.encode_image(pixel_values)
