"""What can be asked of quantization, and what it comes to for a model's layers."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert import plan
from fastvlm_mlx.convert.parts import PARTS
from fastvlm_mlx.convert.quantize.scheme import PRESETS, LayerScheme, Quantization, is_sensitive
from fastvlm_mlx.errors import ConversionError
from tests.checkpoints import SOURCES


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return plan(SOURCES["apple-untied"]).config


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "int"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, not 'int'"),
        ({"preset": "int5"}, "preset must be one of int8, int4, mixed_4_6, mixed_4_8, auto, not 'int5'"),
        ({"bits": 7}, "bits in mode affine must be one of 2, 3, 4, 5, 6, 8, not 7"),
        ({"bits": 8, "mode": "mxfp4"}, "bits in mode mxfp4 must be 4, not 8"),
        ({"mode": "nvfp4", "group_size": 32}, "group size in mode nvfp4 must be 16, not 32"),
        ({"bits": 4, "group_size": 48}, "group size in mode affine must be one of 32, 64, 128, not 48"),
        ({"preset": "int4", "bits": 4}, "preset int4 sets the bits; leave either it or bits 4 out"),
        ({"preset": "int4", "mode": "mxfp4"}, "preset int4 is affine; leave it out for mode mxfp4"),
        ({"preset": "auto"}, "preset auto and a target in bits per weight belong together"),
        ({"bits": 4, "target_bpw": 4.5}, "preset auto and a target in bits per weight belong together"),
        ({"preset": "auto", "target_bpw": 2.0}, "target_bpw must be between 3.5 and 8.5, what 3 and 8 bits"),
        ({"preset": "auto", "target_bpw": 3.9, "group_size": 32}, "target_bpw must be between 4 and 9"),
        ({"preset": "auto", "target_bpw": 5.0, "parts": {"embed": 6}}, "preset auto chooses the bits of embed"),
        ({"bits": 4, "method": "awq"}, "method must be one of rtn, gptq, not 'awq'"),
        ({"mode": "mxfp4", "method": "gptq"}, "method gptq quantizes in mode affine, not mxfp4"),
        ({"bits": 4, "parts": {"head": 8}}, "part must be one of decoder, embed, projector, vision, not 'head'"),
        ({"bits": 4, "parts": dict.fromkeys(PARTS, 8)}, "every part has bits of its own, so bits 4 would change"),
        ({"mode": "mxfp4", "parts": dict.fromkeys(PARTS, 8)}, "so mode mxfp4 would change nothing; leave it out"),
        ({"bits": 4, "parts": {"vision": 7}}, "bits of vision must be one of 0, 2, 3, 4, 5, 6, 8, not 7"),
    ],
)
def test_impossible_combinations_say_what_is_possible(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError) as raised:
        Quantization(**asked)
    assert message in str(raised.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_each_part_its_bits(config: ModelConfig, preset: str) -> None:
    layers = Quantization(preset=preset, group_size=32).allocate(config).layers
    bits = PRESETS[preset].bits
    assert layers["language_model.model.embed_tokens"] == LayerScheme(group_size=32, bits=bits["embed"])
    assert layers["language_model.lm_head"].bits == bits["embed"]
    assert layers["mm_projector.0"].bits == bits["projector"]
    assert layers["language_model.model.layers.0.self_attn.q_proj"].bits == bits["decoder"]
    assert layers["vision_tower.stages.3.blocks.0.token_mixer.proj"].bits == bits["vision"]


def test_sensitive_layers_are_those_of_mlx_lm() -> None:
    predicate = pytest.importorskip("mlx_lm.convert").mixed_quant_predicate_builder
    from mlx_lm.models.qwen2 import Model, ModelArgs

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    arguments = {"model_type": "qwen2", "num_hidden_layers": 24, "rms_norm_eps": 1e-6, "vocab_size": 64, **sizes}
    model = Model(ModelArgs(**arguments))
    chosen = predicate("mixed_4_6", model)
    for path, module in model.named_modules():
        if ".layers." in path and hasattr(module, "to_quantized"):
            high = chosen(path, module)["bits"] == 6
            assert is_sensitive(f"language_model.{path}", {"language_model": 24}) == high, path


def test_what_a_group_does_not_divide_stays_in_floating_point(config: ModelConfig) -> None:
    allocation = Quantization(bits=4, group_size=64, parts={"projector": 0}).allocate(config)
    narrow = "vision_tower.stages.2.blocks.0.conv_ffn.fc1"
    assert allocation.kept[narrow] == "32 inputs, which groups of 64 do not divide"
    assert allocation.kept["mm_projector.2"] == "not requested"
    assert narrow not in allocation.layers
    assert not allocation.layers.keys() & allocation.kept.keys()


def test_nothing_left_to_quantize(config: ModelConfig) -> None:
    with pytest.raises(ConversionError, match="no layer of this checkpoint can be quantized like this: not requested"):
        Quantization(bits=4, parts=dict.fromkeys(("decoder", "embed", "projector", "vision"), 0)).allocate(config)


def test_a_target_allows_for_the_scales_that_are_stored(config: ModelConfig) -> None:
    quantization = Quantization(preset="auto", target_bpw=4.5, group_size=32)
    assert quantization.allocate(config).scale_bits == 16
    with pytest.raises(ConversionError, match=r"target_bpw must be between 5 and 10, .* not 4\.5"):
        quantization.allocate(replace(config, dtype="float32"))


def test_compensation_without_a_layer_for_it_is_refused(config: ModelConfig) -> None:
    parts = {"decoder": 0, "projector": 0, "vision": 0}
    with pytest.raises(ConversionError, match="method gptq leaves embedding and head as they are, and no other"):
        Quantization(bits=4, parts=parts, group_size=32, method="gptq").allocate(config)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"preset": "int8"}, "int8, rtn"),
        (
            {"bits": 4, "parts": {"vision": 0, "embed": 6}, "group_size": 32},
            "4 bits, embed 6, vision none, groups of 32",
        ),
        ({"parts": dict.fromkeys(PARTS, 8)}, "decoder 8, embed 8, projector 8, vision 8, rtn"),
        ({"preset": "auto", "target_bpw": 4.5, "method": "gptq"}, "auto at 4.5 bits per weight, gptq"),
        ({"mode": "mxfp4"}, "4 bits, mxfp4, rtn"),
    ],
)
def test_the_name_of_a_request_says_all_of_it(asked: dict[str, Any], name: str) -> None:
    assert Quantization(**asked).name.startswith(name)


def test_embeddings_are_affine_in_every_mode(config: ModelConfig) -> None:
    layers = Quantization(mode="mxfp4", parts={"vision": 8}).allocate(config).layers
    assert layers["language_model.model.embed_tokens"] == LayerScheme(group_size=32, bits=4, mode="affine")
    assert layers["language_model.model.layers.0.mlp.up_proj"] == LayerScheme(group_size=32, bits=4, mode="mxfp4")
    assert layers["vision_tower.stages.3.blocks.0.conv_ffn.fc1"] == LayerScheme(group_size=32, bits=8, mode="affine")


def test_settings_are_recorded_as_mlx_lm_records_them(config: ModelConfig) -> None:
    recorded = Quantization(bits=4, group_size=32).allocate(config).config()
    assert json.dumps(recorded.to_dict()) == '{"group_size": 32, "bits": 4, "mode": "affine"}'
