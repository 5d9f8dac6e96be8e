"""The functions that write checkpoints check their arguments before any work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.convert import convert_checkpoint, quantize_checkpoint
from fastvlm_mlx.convert.pipeline import convert_and_quantize
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.errors import FastVLMError
from tests.conftest import Converted

INT8 = Quantization(bits=8, group_size=32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": 5}, "source must be a path, not int"),
        ({"destination": None}, "destination must be a path, not NoneType"),
        ({"destination": "a" * 5000}, "cannot be written: File name too long"),
        ({"destination": "\ud800"}, r"cannot be written: .*surrogates not allowed"),
        ({"quantization": "int8"}, "quantization must be a Quantization.*, not str"),
        ({"calibration": 5}, "calibration must be a list of images and folders, not int"),
        ({"calibration": [None]}, "an image for calibration must be a path, not NoneType"),
        ({"gates": True}, "gates must be a list of conditions, not bool"),
        ({"gates": [b"top1>=0"]}, r"a gate must be a text such as 'top1>=0\.95', not b'top1>=0'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    changed: dict[str, Any], message: str, converted: Converted, tmp_path: Path
) -> None:
    right = {"source": converted("apple"), "destination": tmp_path / "out", "quantization": INT8}
    with pytest.raises(FastVLMError, match=message):
        quantize_checkpoint(**{**right, **changed})
    if "source" not in changed:  # any name of a checkpoint
        with pytest.raises(FastVLMError, match=message):
            convert_and_quantize(**{**right, **changed})
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_of_the_wrong_kind_is_named(converted: Converted, tmp_path: Path) -> None:
    for dtype in (["float16"], np.zeros(2), 5):
        with pytest.raises(FastVLMError, match="dtype must be float16, bfloat16 or float32, not"):
            convert_checkpoint(converted("apple"), tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": [8]}, r"bits in mode affine must be one of 2, 3, 4, 5, 6, 8, not \[8\]"),
        ({"mode": np.zeros(2)}, "mode must be one of affine, "),
        ({"parts": 8}, "parts must map parts to bits, not 8"),
        ({"preset": "auto", "target_bpw": "4"}, "target_bpw must be a number, not '4'"),
    ],
)
def test_a_request_of_the_wrong_kind_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FastVLMError, match=message):
        Quantization(**values)
