"""A converted folder that is not whole and sound is an error before anything is computed with it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastvlm_mlx.checkpoint import load
from fastvlm_mlx.checkpoint.folder import checked_files, read_files, read_weights
from fastvlm_mlx.checkpoint.load import load_model, read_parameters
from fastvlm_mlx.errors import CheckpointError
from tests.checkpoints import Tensors, changed
from tests.conftest import Converted

NORM = "language_model.model.norm.weight"
PROJ = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        (
            "text_config",
            "num_hidden_layers",
            999,
            "config.json says 999 language_model.model.layers.#, the tensors have 2",
        ),
        (
            "vision_config",
            "depths",
            [1, 900, 2, 1, 1],
            "config.json says 900 vision_tower.stages.1.blocks.#, the tensors",
        ),
    ],
)
def test_modules_are_not_built_for_layers_that_no_tensor_has(
    part: str, key: str, value: Any, message: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(converted("apple"), tmp_path / "it")
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    if key == "depths":
        for stage, depth in zip(config[part]["scales"]["stages"], value, strict=True):
            stage["hidden"] = [1.0] * depth
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(load, "FastVLM", None)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(folder)


def integers(values: Tensors) -> None:
    values[PROJ] = values[PROJ].astype(np.int32)


def test_weights_of_another_kind_are_refused(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "it", edit=integers)
    with pytest.raises(CheckpointError, match=rf"{PROJ} is int32, expected a floating-point type"):
        load_model(folder)


def test_a_tensor_in_two_files_is_refused(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "it")
    save_file({NORM: np.ones(64, np.float32)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: holds {NORM}, which another file holds, too"):
        read_weights(folder)


def test_a_file_that_is_exchanged_after_its_check_is_noticed(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "it")
    files = checked_files(folder)
    shutil.copy(folder / "model.safetensors", folder / "other")
    os.replace(folder / "other", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed while it was read; try again when it is complete"):
        read_files(files)


def test_a_file_that_is_cut_off_before_its_weights_are_used_is_an_error(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "it")
    model = load_model(folder, lazy=True)
    os.truncate(folder / "model.safetensors", 10**6)
    with pytest.raises(CheckpointError, match="its weights cannot be read"):
        read_parameters(model, folder)


def test_a_path_that_mlx_cannot_open_is_an_error_that_says_so(converted: Converted, tmp_path: Path) -> None:
    folder = changed(converted("apple"), tmp_path / "\udcff")
    with pytest.raises(CheckpointError, match=r"udcff/model\.safetensors: MLX cannot open a path that is not UTF-8"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", r"config\.json: is not an ordinary file"), ("model.safetensors", r"model\.safetensors missing")],
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    name: str, message: str, converted: Converted, tmp_path: Path
) -> None:
    folder = changed(converted("apple"), tmp_path / "it")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
