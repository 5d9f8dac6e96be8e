"""What is no whole and sound checkpoint is neither quantized nor exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.convert import quantize_checkpoint
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.errors import CheckpointError
from tests.checkpoints import Tensors, changed
from tests.conftest import Converted

UP_PROJ = "language_model.model.layers.0.mlp.up_proj.weight"
BIAS = "vision_tower.stages.1.blocks.0.conv_ffn.fc1.bias"


def filled(name: str, value: float) -> Callable[[Tensors], None]:
    def fill(values: Tensors) -> None:
        values[name].flat[-1] = value

    return fill


def quantized(source: Path, target: Path) -> object:
    return quantize_checkpoint(source, target, Quantization(bits=8, group_size=32))


DAMAGED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN in a layer": (filled(UP_PROJ, np.nan), f"tensor {UP_PROJ} holds NaN or infinite values"),
    "infinity in a bias": (filled(BIAS, np.inf), f"tensor {BIAS} holds NaN or infinite values"),
    "another shape": (lambda values: values.update({UP_PROJ: values[UP_PROJ][:, :-1].copy()}), "has shape"),
    "another tensor": (lambda values: values.update(x=np.ones(1)), "has tensors that no rule knows: x"),
    "a tensor less": (lambda values: values.pop(BIAS), f"lacks {BIAS}"),
}


@pytest.mark.parametrize("write", [quantized, export_mlx_vlm])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused_and_nothing_is_written(
    case: str, write: Callable[[Path, Path], Any], converted: Converted, tmp_path: Path
) -> None:
    edit, message = DAMAGED[case]
    folder = changed(converted("apple"), tmp_path / "source", edit=edit)
    with pytest.raises(CheckpointError, match=message):
        write(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_gives_no_numbers_is_not_quantized(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "source", edit=lambda values: values[UP_PROJ].fill(3e38))
    with pytest.raises(CheckpointError, match=r"gives no numbers .*convert it again, with another --dtype"):
        quantized(folder, tmp_path / "out")
