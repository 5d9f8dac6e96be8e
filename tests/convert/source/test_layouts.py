"""The rules cover every layout completely, and nothing else passes."""

import re
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.convert import plan
from fastvlm_mlx.convert.conversion import open_conversion
from fastvlm_mlx.convert.source.match import match, recognise
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.convert.source.upstream import LM_HEAD
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.checkpoints import MANIFESTS, SOURCES, header_only

RELEASED = {
    "0.5b": (24, 896, 151936, True, 494_032_768),
    "1.5b": (28, 1536, 151936, True, 1_543_714_304),
    "7b": (28, 3584, 152064, False, 7_615_616_512),
}
"""Layers, width, vocabulary, whether the head is tied, and the decoder's parameters (Qwen2's own)."""


def keys(folder: Path) -> list[str]:
    with open_source(folder) as source:
        return list(source.tensors)


@pytest.mark.parametrize("manifest", sorted(MANIFESTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_released_layout_fills_every_parameter_of_its_model(manifest: Path, tmp_path: Path) -> None:
    family, _, size = manifest.stem.rpartition("_")
    planned = plan(header_only(manifest, tmp_path / "source"))
    layers, width, vocabulary, tied, parameters = RELEASED[size]
    assert planned.layout == {"apple": "Apple, as released", "transformers": "transformers fast_vlm"}.get(
        family, "mlx-vlm"
    )
    text, vision = planned.config.text_config, planned.config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.tie_word_embeddings) == (layers, width, tied)
    assert vision.depths == (2, 12, 24, 4, 2)
    assert vision.embed_dims == (96, 192, 384, 768, 1536)
    decoder = planned.parameters["decoder"] + planned.parameters["embed"]
    assert decoder == parameters + (text.vocab_size - vocabulary) * width * (2 - tied)
    model = FastVLM(planned.config)
    model.language_model.split()
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    assert {name: stored.shape for shard in planned.shards for name, stored in shard.tensors.items()} == shapes


@pytest.mark.parametrize("manifest", sorted(MANIFESTS.glob("*_0.5b.json")), ids=lambda path: path.stem)
def test_every_tensor_of_a_released_layout_is_used_once_or_dropped_with_a_reason(
    manifest: Path, tmp_path: Path
) -> None:
    folder = header_only(manifest, tmp_path / "source")
    names = keys(folder)
    found = match(recognise(names, "it"), names, "it")
    used = list(found.targets.values())
    assert sorted([*used, *found.dropped]) == sorted(names)
    assert all(found.dropped.values())
    with open_conversion(folder) as conversion:
        inputs = [target for fold in conversion.folds for target in fold.inputs]
    head = {LM_HEAD} & set(found.targets)  # tied, so that no fold takes it
    assert sorted([*inputs, *head]) == sorted(found.targets)


@pytest.mark.parametrize("name", SOURCES)
def test_a_golden_checkpoint_is_recognised_by_its_keys(name: str) -> None:
    expected = {
        "apple-untied": "apple-train",
        "apple-hot": "apple-train",
        "mlx-vlm-q8": "mlx-vlm",
        "mlx-vlm-q4": "mlx-vlm",
    }
    assert recognise(keys(SOURCES[name]), name).name == expected.get(name, name)


@pytest.mark.parametrize("name", ["apple-train", "apple", "transformers-train", "transformers", "mlx-vlm-q4"])
def test_no_tensor_may_be_missing(name: str) -> None:
    names = keys(SOURCES[name])
    layout = recognise(names, name)
    optional = re.compile(r".*(num_batches_tracked|head\.proj|rotary_emb\.inv_freq)$|lm_head\.weight$|.*\.biases$")
    needed = [key for key in names if not optional.match(key)]
    assert len(needed) > 100
    for key in needed:
        with pytest.raises(CheckpointError) as error:
            match(layout, [other for other in names if other != key], "it")
        mentioned = key.removesuffix("scales") + "biases" if key.endswith(".scales") else key
        assert mentioned in str(error.value)


@pytest.mark.parametrize(
    "extra",
    [
        "model.vision_tower.vision_tower.model.network.0.0.convffn.fc3.weight",
        "model.vision_tower.vision_tower.model.network.11.0.layer_scale",
        "model.layers.999999999999.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.image_newline",
    ],
)
def test_no_tensor_may_be_left_over(extra: str) -> None:
    names = [*keys(SOURCES["apple"]), extra]
    with pytest.raises(CheckpointError, match=r"tensors that no rule knows|lacks") as error:
        match(recognise(names, "it"), names, "it")
    assert extra in str(error.value) or "999999999999" in extra


def test_an_optional_branch_is_there_completely_or_not_at_all() -> None:
    names = keys(SOURCES["apple-untied"])
    stem = "model.vision_tower.vision_tower.model.patch_embed.0.rbr_scale."
    without = [name for name in names if not name.startswith(stem)]
    layout = recognise(names, "it")
    assert len(match(layout, names, "it").targets) - len(match(layout, without, "it").targets) == 5
    with pytest.raises(CheckpointError, match=rf"lacks {re.escape(stem)}conv.weight"):
        match(layout, [*without, *(f"{stem}bn.{leaf}" for leaf in ("bias", "running_mean", "running_var"))], "it")


def test_an_unknown_layout_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="not a FastVLM checkpoint of a known layout") as error:
        recognise(["vision_model.embeddings.patch_embedding.weight"], "clip")
    assert "vision_model.embeddings.patch_embedding.weight" in str(error.value)
    assert "transformers fast_vlm" in str(error.value)
