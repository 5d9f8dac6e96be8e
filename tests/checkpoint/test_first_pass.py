"""The first prompt of a model whose weights are still in a file gives what any prompt gives."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.conftest import Converted

pytestmark = pytest.mark.skipif(device() != "cpu", reason="a GPU computes in what is stored")

IDS = [5, 6, IMAGE_TOKEN, 7, 8, 9]
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)


def logits(model: FastVLM, rows: int = 1) -> np.ndarray:
    """Of the positions behind the prompt and behind one more token."""
    first, cache = model.prefill([IDS] * rows, np.repeat(PIXELS, rows, axis=0))
    second = model.language_model(mx.array([[3]] * rows), cache)[:, -1]
    return np.concatenate([np.asarray(first), np.asarray(second)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_first_prompt_gives_the_same_numbers_as_any(dtype: str, rows: int, converted: Converted) -> None:
    folder = converted("apple", dtype)
    model = load_model(folder, dtype="float32", lazy=True)
    assert model.language_model.first_pass is not None
    first = logits(model, rows)
    assert model.language_model.first_pass is None
    np.testing.assert_array_equal(first, logits(model, rows))
    np.testing.assert_array_equal(first, logits(load_model(folder, dtype="float32"), rows))


def test_the_blocks_weights_are_not_in_memory_after_the_first_prompt(converted: Converted) -> None:
    model = load_model(converted("apple", "float16"), dtype="float32", lazy=True)
    layers = model.language_model.layers
    size = sum(weight.nbytes for layer in layers for _, weight in tree_flatten(layer.parameters()))
    before = mx.get_active_memory()
    prefilled = model.prefill([5, 6, 7])
    head = model.language_model.model.embed_tokens.weight.nbytes
    assert mx.get_active_memory() - before < head + size / 2
    mx.eval(model.language_model.parameters())
    assert mx.get_active_memory() - before > head + size
    del prefilled


@pytest.mark.parametrize("part", ["model.norm", "model.embed_tokens", "model.layers.1.mlp.down_proj"])
def test_weights_that_were_changed_before_the_first_prompt_count(part: str, converted: Converted) -> None:
    folder = converted("apple", "float16")
    lazy, read = load_model(folder, dtype="float32", lazy=True), load_model(folder, dtype="float32")
    for model in (lazy, read):
        module = dict(model.language_model.named_modules())[part]
        module.weight = module.weight * 0.5
    np.testing.assert_array_equal(logits(lazy), logits(read))


def test_a_file_that_is_exchanged_before_the_first_prompt_is_an_error(converted: Converted, tmp_path: Path) -> None:
    folder = shutil.copytree(converted("apple", "float16"), tmp_path / "it")
    model = load_model(folder, dtype="float32", lazy=True)
    shutil.copy(folder / "model.safetensors", folder / "other")
    os.replace(folder / "other", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        model.prefill([5, 6, 7])


def test_a_first_prompt_that_fails_leaves_the_weights_as_they_were(
    converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted("apple", "float16")
    model = load_model(folder, dtype="float32", lazy=True)
    layers = model.language_model.layers

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object, **__: object) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(layers[1].mlp), "__call__", interrupt)
        with pytest.raises(Interrupt):
            model.prefill([5, 6, 7])
    np.testing.assert_array_equal(logits(model), logits(load_model(folder, dtype="float32")))
