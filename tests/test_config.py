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
