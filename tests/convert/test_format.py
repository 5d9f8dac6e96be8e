"""Version 2 of the format, in which projections are fused, and version 1, in which none is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert import convert_checkpoint, quantize_checkpoint, verify
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.quantize.checkpoint import Source
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.schema import shown
from tests.checkpoints import SOURCES, in_first_format, tensors
from tests.conftest import Converted

LAYER = "language_model.model.layers.0"
IDS = [[5, 17, 3, 96, 40, 8]]


def logits(model: FastVLM) -> Any:
    return np.array(model.prefill(IDS)[0])


def assert_same_file(first: Path, second: Path) -> None:
    """But for the order of the tensors."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, strict=True)


@pytest.mark.parametrize("name", SOURCES)
def test_version_1_of_every_layout_loads_and_gives_the_same_logits(
    name: str, converted: Converted, tmp_path: Path
) -> None:
    first = in_first_format(converted(name), tmp_path / "first")
    assert not any("qkv_proj" in key for key in load_file(first / "model.safetensors"))
    model = load_model(first)
    assert "qkv_proj" in model.language_model.layers[0].self_attn
    np.testing.assert_array_equal(logits(model), logits(load_model(converted(name))))


def test_version_1_is_converted_quantized_and_exported_to_the_same_tensors(
    converted: Converted, tmp_path: Path
) -> None:
    second = converted("apple")
    first = in_first_format(second, tmp_path / "first")
    int4 = Quantization(preset="mixed_4_6", group_size=32, parts={"vision": 0, "projector": 0})
    for number, source in enumerate((first, second)):
        convert_checkpoint(source, tmp_path / f"float32-{number}", dtype="float32")
        quantize_checkpoint(source, tmp_path / f"int4-{number}", int4)
        export_mlx_vlm(source, tmp_path / f"export-{number}")
    for name in ("float32", "int4", "export"):
        assert_same_file(tmp_path / f"{name}-0", tmp_path / f"{name}-1")
    assert_same_file(tmp_path / "float32-0", second)
    assert verify(first, second).first_drift is None


def test_a_fused_projection_holds_the_rows_of_its_parts_in_order(converted: Converted) -> None:
    stored, source = (
        load_file(converted("apple") / "model.safetensors"),
        load_file(SOURCES["apple"] / "model.safetensors"),
    )
    for fused, parts, leaf in (
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), "weight"),
        ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), "bias"),
        ("mlp.gate_up_proj", ("gate_proj", "up_proj"), "weight"),
    ):
        block = fused.partition(".")[0]
        expected = [source[f"model.layers.0.{block}.{part}.{leaf}"] for part in parts]
        np.testing.assert_array_equal(stored[f"{LAYER}.{fused}.{leaf}"], np.concatenate(expected))


def test_parts_that_a_recipe_quantizes_alike_are_fused_and_others_stay_apart(
    converted: Converted, tmp_path: Path
) -> None:
    """`mixed_4_6` gives v_proj more bits than q_proj and k_proj in some layers; here in the second of two."""
    folder = tmp_path / "mixed"
    quantize_checkpoint(converted("apple"), folder, Quantization(preset="mixed_4_6", group_size=32))
    names = load_file(folder / "model.safetensors").keys()
    apart = {name.partition(".self_attn.")[0] for name in names if name.endswith(".v_proj.scales")}
    fused = {name.partition(".self_attn.")[0] for name in names if name.endswith(".qkv_proj.scales")}
    layers = {f"language_model.model.layers.{number}" for number in range(2)}
    assert apart
    assert apart | fused == layers
    assert not apart & fused
    assert {name.partition(".mlp.")[0] for name in names if name.endswith(".gate_up_proj.scales")} == layers
    config = ModelConfig.from_path(folder)
    assert config.quantization is not None
    for layer in layers:
        bits = [config.quantization.for_layer(f"{layer}.self_attn.{part}_proj").bits for part in "qkv"]
        assert bits == ([4, 4, 6] if layer in apart else [4, 4, 4])
    convert_checkpoint(folder, tmp_path / "exact", dtype="float32", dequantize=True)
    close = np.abs(logits(load_model(tmp_path / "exact"))).max() * 1e-4
    np.testing.assert_allclose(logits(load_model(folder)), logits(load_model(tmp_path / "exact")), atol=close)
    np.testing.assert_array_equal(
        logits(load_model(folder, in_parts=True)).argmax(), logits(load_model(folder)).argmax()
    )


def test_a_fused_projection_with_other_rows_is_refused(converted: Converted, tmp_path: Path) -> None:
    folder = in_first_format(converted("apple"), tmp_path / "it")
    values = dict(load_file(converted("apple") / "model.safetensors"))
    name = f"{LAYER}.mlp.gate_up_proj.weight"
    values[name] = values[name][:-2].copy()
    save_file(values, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[254, 64\], but config.json needs 256 rows"):
        convert_checkpoint(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(254, 64\), expected \(256, 64\)"):
        load_model(folder)


def test_parts_of_one_matrix_cannot_be_quantized_differently() -> None:
    other = {f"{LAYER}.self_attn.v_proj": LayerQuantization(bits=6)}
    settings = QuantizationConfig(default=LayerQuantization(bits=4), overrides=other)
    assert settings.for_layer(f"{LAYER}.mlp.gate_up_proj").bits == 4
    with pytest.raises(ConfigError, match=r"the parts of .*qkv_proj different settings, but they are one matrix"):
        settings.for_layer(f"{LAYER}.self_attn.qkv_proj")


def test_a_reader_of_version_1_says_what_to_do(converted: Converted) -> None:
    """It refuses every entry but the number 1, and shows it."""
    entry = json.loads((converted("apple") / "config.json").read_text())["fastvlm_format"]
    assert entry != 1
    assert "pip install -U fastvlm-mlx" in shown(entry)


def test_a_version_that_is_still_to_come_says_what_to_do(converted: Converted, tmp_path: Path) -> None:
    folder = in_first_format(converted("apple"), tmp_path / "it")
    config = json.loads((folder / "config.json").read_text())
    for entry in (3, "3; whatever it says", "2nd", "9" * 5000, -1):
        (folder / "config.json").write_text(json.dumps({**config, "fastvlm_format": entry}))
        with pytest.raises(ConfigError, match="this one reads 1 and 2: pip install -U fastvlm-mlx, or convert"):
            load_model(folder)


def test_the_parts_of_a_projection_share_its_bytes(converted: Converted) -> None:
    with open_source(converted("apple")) as opened:
        assert isinstance(opened, Source)
        parts = opened.in_parts(ModelConfig.from_path(converted("apple")).text_config)
        assert parts.nbytes == opened.nbytes
        assert sum(tensor.nbytes for tensor in parts.tensors.values()) == sum(t.nbytes for t in opened.tensors.values())
        for name, value in tensors(converted("apple")).items():
            np.testing.assert_array_equal(parts.tensors[name].read(), value)


def test_joining_the_parts_reads_nothing(converted: Converted, tmp_path: Path) -> None:
    first = in_first_format(converted("apple"), tmp_path / "first")
    before = mx.get_active_memory()
    model = load_model(first, lazy=True)
    assert mx.get_active_memory() - before < 10_000
    assert model.language_model.layers[0].mlp.gate_up_proj.weight.shape == (256, 64)
