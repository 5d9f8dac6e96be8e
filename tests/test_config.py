import json

import pytest

from fastvlm_mlx.config import (
    ActivationScales,
    LayerQuantization,
    ModelConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from fastvlm_mlx.errors import ConfigError

ENTRY = {"group_size": 64, "bits": 4, "mode": "affine", "lm_head": {"bits": 8}, "skipped": False}


def config(**changes: object) -> ModelConfig:
    depths = (1, 1, 1, 1, 1)
    vision = VisionConfig(embed_dims=(16, 32, 64, 128, 256), depths=depths, scales=ActivationScales.ones(depths))
    text = TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=384,
    )
    return ModelConfig(vision_config=vision, text_config=text, eos_token_id=(1,), **changes)


def test_an_override_takes_the_rest_from_the_default() -> None:
    quantization = QuantizationConfig.from_dict(ENTRY)
    assert quantization.for_layer("lm_head") == LayerQuantization(group_size=64, bits=8)
    assert (
        quantization.for_layer("skipped") == quantization.for_layer("any") == LayerQuantization(group_size=64, bits=4)
    )


def test_the_shortest_record_has_the_most_common_settings_as_its_default() -> None:
    eight, four = LayerQuantization(group_size=32, bits=8), LayerQuantization(group_size=32, bits=4)
    quantization = QuantizationConfig.of({"a": four, "b": eight, "c": eight})
    assert (quantization.default, dict(quantization.overrides)) == (eight, {"a": four})
    assert QuantizationConfig.from_dict(quantization.to_dict()) == quantization


def test_a_model_config_survives_its_json() -> None:
    quantized = config(quantization=QuantizationConfig.from_dict(ENTRY))
    assert ModelConfig.from_dict(quantized.to_dict()) == quantized
    assert "quantization" not in config().to_dict()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([4], r"quantization must be an object with group_size, bits and mode, not \[4\]"),
        ({"bits": "4"}, r"LayerQuantization\.bits must be a positive integer, not '4'"),
        ({"bits": 4, "group_size": 0}, r"LayerQuantization\.group_size must be a positive integer, not 0"),
        ({"mode": 4}, r"LayerQuantization\.mode must be a text, not 4"),
        ({"bits": 4, "lm_head": {"bits": -1}}, r"LayerQuantization\.bits must be a positive integer, not -1"),
    ],
)
def test_an_entry_of_the_wrong_kind(entry: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**config().to_dict(), "quantization": entry})


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, float("inf"), float("nan")])
def test_a_scale_is_a_power_of_two(scale: float) -> None:
    with pytest.raises(ConfigError, match="scales must be powers of two"):
        ActivationScales(stages=(), conv_exp=scale)


NOT_A_CONFIG: dict[str, tuple[tuple[str, ...], object, str]] = {
    "layers beyond reason": (("text_config", "num_hidden_layers"), 10**6, "num_hidden_layers must be at most 1000"),
    "a vocabulary beyond MLX": (("text_config", "vocab_size"), 10**12, "vocab_size must be at most 16777216"),
    "a width of 30 digits": (("text_config", "hidden_size"), 10**30, "hidden_size must be at most 16777216"),
    "a size as text": (("text_config", "intermediate_size"), "128", "intermediate_size must be a positive integer"),
    "a whole number as float": (("text_config", "num_attention_heads"), 2.0, "must be a positive integer, not 2.0"),
    "negative epsilon": (("text_config", "rms_norm_eps"), -1, "rms_norm_eps must be a number from 1e-12 to 0.1"),
    "no epsilon": (("text_config", "rms_norm_eps"), None, "rms_norm_eps must be a number .*, not None"),
    "an epsilon of 0": (("text_config", "rms_norm_eps"), 0, "rms_norm_eps must be a number .*, not 0"),
    "a huge epsilon": (("text_config", "rms_norm_eps"), 1e300, r"rms_norm_eps must be a number .*, not 1e\+300"),
    "theta as text": (("text_config", "rope_theta"), "1e6", r"rope_theta must be a number from 1 to 1e\+12, not '1e6'"),
    "tiny theta": (("text_config", "rope_theta"), 1e-320, "rope_theta must be a number"),
    "infinite theta": (("text_config", "rope_theta"), float("inf"), "rope_theta must be a number .*, not inf"),
    "rope as a list": (("text_config", "rope_scaling"), [1], r"rope_parameters must be an object, not \[1\]"),
    "tied as text": (("text_config", "tie_word_embeddings"), "no", "tie_word_embeddings must be true or false"),
    "no positions": (("text_config", "max_position_embeddings"), 0, "must be a positive integer, not 0"),
    "no text_config": (("text_config",), 7, "text_config must be an object, not 7"),
    "no vision_config": (("vision_config",), None, "vision_config must be an object, not None"),
    "blocks beyond reason": (("vision_config", "depths"), [10**5, 1, 1, 1, 1], "depths must be at most 1000"),
    "depths as a text": (("vision_config", "depths"), "11111", "depths must be a list, not '11111'"),
    "widths of floats": (("vision_config", "embed_dims"), [16.0, 32, 64, 128, 256], "embed_dims must be a positive"),
    "a picture of terapixels": (("vision_config", "image_size"), 64 * 10**9, "image_size must be at most 16384"),
    "a wide mlp": (("vision_config", "mlp_ratio"), 10**9, "mlp_ratio must be at most 1024"),
    "another head": (("vision_config", "head_dim"), 1, "head_dim must be 32"),
    "layer norm": (("vision_config", "layer_norm_eps"), "x", "layer_norm_eps must be a number"),
    "scales as a text": (("vision_config", "scales"), "x", "scales must be an object, not 'x'"),
    "a scale of 10**400": (("vision_config", "scales", "conv_exp"), 10**400, "scales must be powers of two"),
    "a scale of 2**200": (("vision_config", "scales", "conv_exp"), 2.0**200, "scales must be powers of two"),
    "a scale of text": (("vision_config", "scales", "stem"), ["1", 1, 1], "scales must be powers of two, not '1'"),
    "a stem of two": (("vision_config", "scales", "stem"), [1, 1], "must have 3 values for the stem and 5 stages"),
    "a stage of numbers": (("vision_config", "scales", "stages"), [1] * 5, "scales.stages must be an object, not 1"),
    "an end of text": (("eos_token_id",), ["x"], "eos_token_id must be an integer of at least 0, not 'x'"),
    "an end beyond the vocabulary": (("eos_token_id",), [384], "eos_token_id must be at most 383, not 384"),
    "an end below": (("eos_token_id",), [-1], "eos_token_id must be an integer of at least 0, not -1"),
    "one end": (("eos_token_id",), 5, "eos_token_id must be a list, not 5"),
    "a length of text": (("max_length",), "8k", "max_length must be a positive integer, not '8k'"),
    "no length": (("max_length",), None, "max_length must be a positive integer, not None"),
    "a negative length": (("max_length",), -5, "max_length must be a positive integer, not -5"),
    "a source of numbers": (("source",), 5, "source must be an object, not 5"),
    "a source that is no text": (("source",), {"name": [1]}, r"source must hold short texts, not \[1\] as 'name'"),
    "a source with escapes": (("source",), {"name": "\x1b[2J"}, "source must hold short texts"),
    "another dtype": (("dtype",), ["float16"], r"dtype must be .*, not \['float16'\]"),
    "true as a version": (("fastvlm_format",), True, "fastvlm_format True was written by another version"),
    "no version": (("fastvlm_format",), [1], r"fastvlm_format \[1\] was written by another version"),
    "an unknown mode": (("quantization",), {"bits": 4, "mode": "int"}, "mode must be one of affine, mxfp4"),
    "impossible bits": (("quantization",), {"bits": 7}, "bits in mode affine must be one of 2, 3, 4, 5, 6, 8, not 7"),
    "impossible groups": (
        ("quantization",),
        {"group_size": 48},
        "group_size in mode affine must be one of 32, 64, 128",
    ),
}


@pytest.mark.parametrize("case", NOT_A_CONFIG)
def test_a_value_of_another_kind_or_out_of_range_is_refused_by_name(case: str) -> None:
    path, value, message = NOT_A_CONFIG[case]
    values = json.loads(json.dumps(config().to_dict()))
    owner = values
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_dict(values)
    assert len(str(error.value)) < 200
