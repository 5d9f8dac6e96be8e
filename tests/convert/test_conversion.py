"""Every layout becomes the same model."""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file

from fastvlm_mlx.checkpoint.folder import read_weights
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert import convert_checkpoint, plan
from fastvlm_mlx.convert.write.shards import cast, shards
from fastvlm_mlx.convert.write.units import Stored, single
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.resolve import load
from tests.checkpoints import GOLDEN, SOURCES, Tensors, changed, tensors

EXPECTED = {
    "apple-train": "apple",
    "apple": "apple",
    "apple-untied": "apple_untied",
    "apple-hot": "apple_hot",
    "transformers-train": "transformers_train",
    "transformers": "transformers_reparam",
    "mlx-vlm": "apple",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every golden checkpoint, converted in float32."""
    folder = tmp_path_factory.mktemp("converted")
    for name, source in SOURCES.items():
        convert_checkpoint(source, folder / name, dtype="float32", dequantize=True)
    return {name: folder / name for name in SOURCES}


@pytest.mark.parametrize("name", EXPECTED)
def test_visual_tokens_are_upstreams(converted: dict[str, Path], name: str) -> None:
    expected = load_file(GOLDEN / EXPECTED[name] / "expected.safetensors")
    model = load_model(converted[name], dtype="float32")
    for key in [key for key in expected if key.endswith("pixel_values")]:
        prefix = key.removesuffix("pixel_values")
        pixels = mx.array(np.moveaxis(expected[key], 0, -1)[None])
        wanted = expected[f"{prefix}projected"]
        # 1e-4 of the largest value: two float32 programs that add in different orders
        np.testing.assert_allclose(
            np.array(model.encode_image(pixels))[0], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=key
        )


def assert_same_weights(first: Tensors, second: Tensors, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(
            second[name], value, rtol=0, atol=tolerance * max(np.abs(value).max(), 1e-30), err_msg=name
        )


def test_branches_fold_to_what_upstream_folds_them_to(converted: dict[str, Path]) -> None:
    assert_same_weights(tensors(converted["apple-train"]), tensors(converted["apple"]), 1e-6)


def test_mlx_vlms_conversion_of_a_checkpoint_gives_the_same_weights(converted: dict[str, Path]) -> None:
    assert_same_weights(tensors(converted["apple"]), tensors(converted["mlx-vlm"]), 1e-6)


@pytest.mark.parametrize(("name", "tolerance"), [("mlx-vlm-q8", 2 / 255), ("mlx-vlm-q4", 2 / 15)])
def test_a_quantized_source_is_dequantized(converted: dict[str, Path], name: str, tolerance: float) -> None:
    """To within a step of its widest group."""
    assert_same_weights(tensors(converted["mlx-vlm"]), tensors(converted[name]), tolerance)


@pytest.mark.parametrize("name", SOURCES)
def test_exactly_the_models_parameters_are_written(converted: dict[str, Path], name: str) -> None:
    config = ModelConfig.from_path(converted[name])
    model = {key: value.shape for key, value in tree_flatten(FastVLM(config).parameters())}
    written = load_file(converted[name] / "model.safetensors")
    assert {key: value.shape for key, value in written.items()} == model
    assert config.text_config.tie_word_embeddings == (name != "apple-untied")


def test_a_head_that_equals_the_embedding_is_dropped_whatever_the_config_says(tmp_path: Path) -> None:
    def add_head(values: Tensors) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()

    source = changed(SOURCES["apple"], tmp_path / "source", edit=add_head, config={"tie_word_embeddings": False})
    done = convert_checkpoint(source, tmp_path / "out", dtype="float32")
    assert done.config.text_config.tie_word_embeddings
    assert ("lm_head.weight", "equal to the embedding, which the head uses") in [
        (tensor.name, tensor.reason) for tensor in done.dropped
    ]
    assert "language_model.lm_head.weight" not in tensors(tmp_path / "out")


def with_a_head(source: Path, target: Path, said: bool | None) -> Path:
    """A copy whose head differs from the embedding in its last value, and whose config says whether they are tied."""

    def add_head(values: Tensors) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
        values["lm_head.weight"][-1, -1] += 1

    return changed(source, target, edit=add_head, config={"tie_word_embeddings": said})


@pytest.mark.parametrize("said", [False, None])
def test_a_head_that_differs_in_its_last_value_is_kept(said: bool | None, tmp_path: Path) -> None:
    source = with_a_head(SOURCES["apple"], tmp_path / "source", said)
    done = convert_checkpoint(source, tmp_path / "out", dtype="float32")
    assert not done.config.text_config.tie_word_embeddings
    written, stored = tensors(tmp_path / "out"), tensors(source)
    np.testing.assert_array_equal(written["language_model.lm_head.weight"], stored["lm_head.weight"])


def test_a_head_that_the_config_contradicts_is_refused_until_an_option_decides(tmp_path: Path) -> None:
    source = with_a_head(SOURCES["apple"], tmp_path / "source", said=True)
    message = (
        r"says tie_word_embeddings, but lm_head\.weight differs .*--tie-word-embeddings, .*--no-tie-word-embeddings"
    )
    with pytest.raises(CheckpointError, match=message):
        plan(source)
    kept, dropped = (plan(source, tie_word_embeddings=tie) for tie in (False, True))
    assert not kept.config.text_config.tie_word_embeddings
    assert dropped.config.text_config.tie_word_embeddings
    assert [tensor.reason for tensor in dropped.dropped if tensor.name == "lm_head.weight"] == [
        "the head is tied to the embedding, as you chose"
    ]


def test_a_head_that_is_not_there_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no head; it can only be tied to the embedding"):
        plan(SOURCES["apple"], tie_word_embeddings=False)

    def add_embedding(values: Tensors) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]

    equal = changed(SOURCES["apple"], tmp_path / "equal", edit=add_embedding)
    with pytest.raises(ConversionError, match="has a head that equals the embedding; it is tied to that"):
        plan(equal, tie_word_embeddings=False)


@pytest.fixture
def exported_decoder(tmp_path: Path) -> Path:
    """The form of Apple's pre-exported archives: a decoder and a projector, quantized, and no tower."""

    def without_tower(values: Tensors) -> None:
        for name in list(values):
            value = values.pop(name)
            if not name.startswith("vision_tower."):
                values[name.replace("mm_projector.", "multi_modal_projector.linear_")] = value

    folder = changed(SOURCES["mlx-vlm-q8"], tmp_path / "exported", edit=without_tower)
    (folder / "LICENSE").write_text("the decoder's")
    return folder


@pytest.mark.parametrize("tower", ["apple", "transformers", "ours", "ours-half"])
def test_the_tower_may_come_from_a_second_source(
    converted: dict[str, Path], exported_decoder: Path, tmp_path: Path, tower: str
) -> None:
    if tower == "ours-half":
        vision = tmp_path / "vision"
        convert_checkpoint(SOURCES["apple-hot"], vision, dtype="float16")
        for name in ("LICENSE", "LICENSE_TOWER"):
            (vision / name).write_text("the tower's")
        alike, tolerance = converted["apple-hot"], 1e-3
    else:
        vision = converted["apple"] if tower == "ours" else SOURCES[tower]
        alike, tolerance = converted["transformers" if tower == "transformers" else "apple"], 1e-6
    done = convert_checkpoint(exported_decoder, tmp_path / "out", dtype="float32", vision_from=vision, dequantize=True)
    assert done.vision_from is not None
    assert done.config.source["vision_name"] == vision.name
    assert len(done.config.source["vision_sha256"]) == 64
    assert (tmp_path / "out" / "LICENSE").read_text() == "the decoder's"
    assert (tmp_path / "out" / "LICENSE_TOWER").exists() == (tower == "ours-half")
    written = tensors(tmp_path / "out")
    parts = {
        part: {name: value for name, value in tensors(folder).items() if name.startswith("vision_tower.") == part}
        for part, folder in ((True, alike), (False, converted["mlx-vlm-q8"]))
    }
    assert_same_weights({name: written[name] for name in parts[True]}, parts[True], tolerance)
    assert_same_weights({name: written[name] for name in parts[False]}, parts[False], 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_rounded_once_to_the_dtype(converted: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    convert_checkpoint(SOURCES["apple"], tmp_path / "out", dtype=dtype)
    exact, rounded = read_weights(converted["apple"]), read_weights(tmp_path / "out")
    for name, value in exact.items():
        assert rounded[name].dtype == getattr(mx, dtype)
        assert mx.array_equal(rounded[name], value.astype(getattr(mx, dtype))), name


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_a_half_precision_source_is_read_exactly(converted: dict[str, Path], tmp_path: Path, stored: str) -> None:
    source = changed(SOURCES["apple"], tmp_path / "source")
    values = {
        name: value.astype(getattr(mx, stored)) if value.dtype == mx.float32 else value
        for name, value in mx.load(str(source / "model.safetensors")).items()
    }
    mx.save_safetensors(str(source / "model.safetensors"), values)
    convert_checkpoint(source, tmp_path / "out", dtype="float32")
    written = tensors(tmp_path / "out")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    expected = np.array(values["model.layers.0.mlp.up_proj.weight"].astype(mx.float32))
    np.testing.assert_array_equal(written[name], expected)
    for name, value in tensors(converted["apple"]).items():
        # bfloat16 keeps 8 bits, and a fold adds several roundings
        np.testing.assert_allclose(written[name], value, rtol=0.02, atol=0.02 * np.abs(value).max(), err_msg=name)


def test_a_converted_checkpoint_converts_to_itself(converted: dict[str, Path], tmp_path: Path) -> None:
    done = convert_checkpoint(converted["apple-untied"], tmp_path / "out", dtype="float32")
    assert done.layout == "fastvlm-mlx"
    assert_same_weights(tensors(converted["apple-untied"]), tensors(tmp_path / "out"), 0)


def test_an_archive_converts_like_its_folder(converted: dict[str, Path], tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "llava-fastvithd_0.5b_stage3"), "zip", SOURCES["apple"])
    done = convert_checkpoint(archive, tmp_path / "out", dtype="float32")
    assert done.config.source["name"] == "llava-fastvithd_0.5b_stage3.zip"
    assert_same_weights(tensors(converted["apple"]), tensors(tmp_path / "out"), 0)


def test_a_padded_vocabulary_is_kept(tmp_path: Path) -> None:
    source = changed(SOURCES["apple"], tmp_path / "source", config={"vocab_size": 370})
    assert plan(source).config.text_config.vocab_size == 384


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.convert.conversion.shards", partial(shards, limit=300_000))
    done = convert_checkpoint(SOURCES["apple"], tmp_path / "out", dtype="float32")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-0000{len(files)}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3
    assert all((tmp_path / "out" / file).stat().st_size < 320_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == done.output_bytes
    for file in files:
        with safe_open(tmp_path / "out" / file, "np") as opened:
            assert opened.metadata() == {"format": "mlx"}
            assert {index["weight_map"][name] for name in opened.keys()} == {file}  # noqa: SIM118
    load_model(tmp_path / "out")


def test_a_folder_that_loads_anywhere_is_written(converted: dict[str, Path], tmp_path: Path) -> None:
    source = changed(SOURCES["transformers"], tmp_path / "checkpoint")
    (source / "LICENSE").write_text("terms")
    (source / "modeling_llava.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    convert_checkpoint(source, tmp_path / "out", dtype="float32")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = ModelConfig.from_path(tmp_path / "out")
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert config.source == {"name": "checkpoint", "revision": None, "layout": "transformers", "sha256": digest}
    assert config.eos_token_id == (367, 369)
    assert (config.max_length, config.vision_config.image_size) == (8192, 128)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [367, 369]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    assert digest in card
    assert "[LICENSE](LICENSE)" in card
    assert str(tmp_path) not in card
    assert FastVLMProcessor.from_folder(tmp_path / "out").encode("Hi", n_images=1).count(-200) == 1


def test_progress_grows_from_nothing_to_all(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert_checkpoint(SOURCES["apple"], tmp_path / "out", dtype="float16", progress=lambda *call: calls.append(call))
    done, totals, labels = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert [label for label in dict.fromkeys(labels) if "calibrating" not in label] == ["reading", "folding", "writing"]


def test_a_plan_reads_headers_and_says_what_would_be_done(tmp_path: Path) -> None:
    planned = plan(SOURCES["apple-untied"], dtype="bfloat16")
    done = convert_checkpoint(SOURCES["apple-untied"], tmp_path / "out", dtype="bfloat16")
    assert done.with_config(source=planned.config.source) == planned
    weights = tmp_path / "out" / "model.safetensors"
    assert 0 < weights.stat().st_size - planned.output_bytes < 30_000
    assert sum(planned.parameters.values()) * 2 == planned.output_bytes
    text = str(planned)
    for piece in ("train-time branches", "bfloat16", "head of its own", "head.proj (49,152 bytes)", "384 tokens"):
        assert piece in text


def test_a_plan_counts_dropped_tensors_that_end_alike_and_ends_with_the_summary() -> None:
    lines = str(plan(SOURCES["apple"])).splitlines()
    assert "                7 × num_batches_tracked (56 bytes)" in lines
    assert lines.index("                7 × num_batches_tracked (56 bytes)") < len(lines) - 6
    assert lines[-1].startswith("total         458,840 parameters")


def test_an_empty_destination_and_new_parents_are_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for destination in (tmp_path / "empty", tmp_path / "new" / "folders" / "out"):
        convert_checkpoint(SOURCES["apple"], destination, dtype="float32")
        assert (destination / "config.json").is_file()


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    def enlarge(values: Tensors) -> None:
        values["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5

    source = changed(SOURCES["apple"], tmp_path / "source", edit=enlarge)
    message = r"language_model.model.layers.1.mlp.up_proj.weight holds 1e\+05, too large for float16"
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")


UP_PROJ = "language_model.model.layers.0.mlp.up_proj"


def requantized(target: Path, said: dict[str, object], **settings: Any) -> tuple[Path, mx.array]:
    """A copy of an 8-bit checkpoint with one layer quantized otherwise, and the weights that it then stands for.

    Args:
        target: The folder of the copy.
        said: Added to what config.json says of the quantization.
        settings: Of `mx.quantize`.
    """
    source = changed(SOURCES["mlx-vlm-q8"], target)
    values = mx.load(str(source / "model.safetensors"))
    exact = mx.load(str(SOURCES["mlx-vlm"] / "model.safetensors"))[f"{UP_PROJ}.weight"]
    parts = mx.quantize(exact, **settings)
    del values[f"{UP_PROJ}.biases"]
    values |= {f"{UP_PROJ}.{name}": part for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}
    mx.save_safetensors(str(source / "model.safetensors"), values)
    config = json.loads((source / "config.json").read_text())
    config["quantization"] |= said
    (source / "config.json").write_text(json.dumps(config))
    return source, mx.dequantize(*parts, **settings).astype(mx.float32)


@pytest.mark.parametrize(
    "path",
    [
        UP_PROJ,
        f"model.{UP_PROJ}",
        "model.language_model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.up_proj",
        "layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ],
)
def test_a_layer_may_be_quantized_differently_whatever_root_its_path_begins_with(path: str, tmp_path: Path) -> None:
    """The last path is another layer's: where layers are listed, but not this one, its tensors decide."""
    layer = {"group_size": 32 if "layers.1" in path else 64, "bits": 8 if "layers.1" in path else 4}
    source, expected = requantized(tmp_path / "source", {path: layer}, group_size=64, bits=4)
    convert_checkpoint(source, tmp_path / "out", dtype="float32", dequantize=True)
    np.testing.assert_array_equal(tensors(tmp_path / "out")[f"{UP_PROJ}.weight"], np.array(expected))
    kept = convert_checkpoint(source, tmp_path / "kept", dtype="float32").config.quantization
    assert kept == QuantizationConfig(
        default=LayerQuantization(group_size=32, bits=8),
        overrides={UP_PROJ: LayerQuantization(group_size=64, bits=4)},
    )


def test_what_a_config_says_of_a_layer_has_to_agree_with_its_tensors(tmp_path: Path) -> None:
    source, _ = requantized(
        tmp_path / "a", {"layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}}, group_size=64, bits=4
    )
    with pytest.raises(CheckpointError, match=rf"{UP_PROJ}\.weight is quantized with bits 4, config\.json says 8"):
        plan(source)
    source, _ = requantized(tmp_path / "b", {}, group_size=64, bits=4)
    with pytest.raises(CheckpointError, match=r"is quantized with group_size 64, config\.json says 32"):
        plan(source)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("said", [True, False])
def test_a_layer_without_biases_is_read_as_its_mode_says_or_as_its_shapes_do(
    mode: str, said: bool, tmp_path: Path
) -> None:
    entry = {UP_PROJ: {"mode": mode, "bits": None, "group_size": None}} if said else {"layers.1": {"bits": 8}}
    source, expected = requantized(tmp_path / "source", entry, mode=mode)
    convert_checkpoint(source, tmp_path / "out", dtype="float32", dequantize=True)
    np.testing.assert_array_equal(tensors(tmp_path / "out")[f"{UP_PROJ}.weight"], np.array(expected))


@pytest.mark.parametrize(
    ("mode", "part"), [("affine", "scales"), ("affine", "biases"), ("mxfp4", "scales"), ("nvfp4", "scales")]
)
def test_a_scale_that_is_no_number_is_noticed_where_a_layer_stays_quantized(
    mode: str, part: str, tmp_path: Path
) -> None:
    entry = {UP_PROJ: {"mode": mode, "bits": None, "group_size": None}}
    source, _ = requantized(tmp_path / "source", entry, mode=mode)
    values = mx.load(str(source / "model.safetensors"))
    values[f"{UP_PROJ}.{part}"][-1, -1] = 255 if values[f"{UP_PROJ}.{part}"].dtype == mx.uint8 else float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), values)
    with pytest.raises(CheckpointError, match=rf"{UP_PROJ}\.{part} holds NaN or infinite values"):
        convert_checkpoint(source, tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("name", ["q8", "q4"])
def test_quantized_weights_of_mlx_vlm_stay_as_they_are_and_give_its_logits(name: str, tmp_path: Path) -> None:
    source = SOURCES[f"mlx-vlm-{name}"]
    done = convert_checkpoint(source, tmp_path / "out", dtype="float32")
    stored, written = tensors(source), tensors(tmp_path / "out")
    layers = {key.removesuffix(".scales") for key in stored if key.endswith(".scales")}
    # the columns of the projector's first layer are permuted, and permuted columns are other groups
    assert done.dequantized == ("mm_projector.0",)
    for key in (f"{layer}.{part}" for layer in layers - {"mm_projector.0"} for part in ("weight", "scales", "biases")):
        np.testing.assert_array_equal(written[key], stored[key], err_msg=key)
    assert done.config.quantization == QuantizationConfig(default=LayerQuantization(group_size=32, bits=int(name[1])))
    assert "quantized     16 layers, kept as they are\ndequantized   1 layers" in str(done)
    expected = load_file(GOLDEN / "mlx_vlm" / "expected.safetensors")
    apple = load_file(GOLDEN / "apple" / "expected.safetensors")
    model, processor = load(tmp_path / "out")
    inputs = processor([GOLDEN / "apple" / "images" / "landscape.png"], "Describe the image.")
    np.testing.assert_array_equal(
        np.float32(inputs["pixel_values"][0]) / 255, np.moveaxis(apple["landscape.pixel_values"], 0, -1)
    )
    logits = np.array(model.prefill(**inputs)[0])[0]
    wanted = expected[f"{name}.logits"]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_shards_hold_at_most_their_limit_or_one_tensor() -> None:
    shapes = {"a": (10, 10), "b": (10, 10), "c": (50, 10), "d": (1,)}
    stored = {name: Stored("F16", shape) for name, shape in shapes.items()}
    files = shards(single(stored), limit=400)
    assert [list(file.tensors) for file in files] == [["a", "b"], ["c"], ["d"]]
    assert files[1].file == "model-00002-of-00003.safetensors"
    assert shards(single(stored))[0].file == "model.safetensors"


def test_casts_round_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:3] = 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8  # halfway between two bfloat16s
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    np.testing.assert_array_equal(cast(values, "BF16", "x"), expected)
    with pytest.raises(ConversionError, match=r"x holds 3.4e\+38, too large for bfloat16"):
        cast(np.array([3.4e38], np.float32), "BF16", "x")
