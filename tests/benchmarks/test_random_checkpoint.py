"""The generator of full-size random checkpoints in `benchmarks/`."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_checkpoint as generator
from fastvlm_mlx.checkpoint.released import SIZES
from fastvlm_mlx.convert import plan

UNUSED = "model.vision_tower.vision_tower.model.head.proj"
VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("size", SIZES)
def test_both_layouts_hold_the_same_tensors(size: str) -> None:
    apple = generator.read_manifest(size, "apple")
    transformers = {generator.apple_name(k): v for k, v in generator.read_manifest(size, "transformers").items()}
    assert apple.keys() - transformers.keys() == {UNUSED}
    assert transformers.keys() <= apple.keys()
    assert {name for name in transformers if transformers[name] != apple[name]} == VOCABULARY


@pytest.mark.parametrize(
    ("size", "layout", "decoder"),
    [
        ("0.5b", "apple", "24 layers of 896, 14 heads (2 key/value)"),
        ("0.5b", "transformers", "24 layers of 896, 14 heads (2 key/value)"),
        ("7b", "apple", "28 layers of 3584, 28 heads (4 key/value)"),
    ],
)
def test_a_checkpoint_of_full_size_is_one_that_converts(tmp_path: Path, size: str, layout: str, decoder: str) -> None:
    generator.write_checkpoint(size, tmp_path / "model", layout=layout, sparse=True)
    planned = plan(tmp_path / "model")
    assert decoder in str(planned)
    assert planned.config.text_config.tie_word_embeddings == (size == "0.5b")
    assert planned.config.vision_config.image_size == 1024
    assert round(planned.parameters["vision"] / 1e6, 1) == 122.7


def test_large_checkpoints_are_sharded_with_an_index(tmp_path: Path) -> None:
    generator.write_checkpoint("7b", tmp_path / "model", sparse=True)
    files = sorted(tmp_path.glob("model/*.safetensors"))
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["weight_map"].keys() == generator.read_manifest("7b", "apple").keys()
    assert all(file.stat().st_size <= generator.SHARD_BYTES + 200_000 for file in files)
    assert sum(file.stat().st_blocks for file in files) * 512 < 10_000_000


def test_values_depend_on_name_and_seed_alone() -> None:
    name, shape = "model.layers.0.mlp.down_proj.weight", (6, 16)
    first, again, other = (np.concatenate(list(generator.values(name, shape, seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    longer = np.concatenate(list(generator.values(name, (8, 16), 0)))
    np.testing.assert_array_equal(longer[:6], first)


def test_the_residual_stream_is_carried_by_kernels_near_the_identity() -> None:
    name = "model.vision_tower.vision_tower.model.network.6.reparam_conv.weight"
    (rows,) = generator.values(name, (768, 1, 7, 7), 0)
    np.testing.assert_allclose(rows[:, 24], 1, atol=0.1)
    assert np.abs(rows).sum(axis=1).max() < 2


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        generator.write_checkpoint("0.5b", tmp_path, sparse=True)
