"""Sizes, bits per weight and memory, counted from shapes."""

import pytest

from fastvlm_mlx.backend import device
from fastvlm_mlx.checkpoint.describe import Part, parts, question_memory
from fastvlm_mlx.checkpoint.released import full_size
from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert.write.units import Stored


def quantized(config: ModelConfig, settings: LayerQuantization) -> ModelConfig:
    return ModelConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        quantization=QuantizationConfig(default=settings),
    )


@pytest.mark.parametrize(
    ("settings", "group"),
    [
        (LayerQuantization(group_size=32, bits=4), 32),
        (LayerQuantization(bits=4), 64),
        (LayerQuantization(mode="nvfp4"), 16),
    ],
)
def test_a_quantized_layer_counts_as_the_weights_it_stands_for(settings: LayerQuantization, group: int) -> None:
    weights = {
        "language_model.a.weight": Stored("U32", (8, 16)),  # 8 rows of 128 weights of 4 bits
        "language_model.a.scales": Stored("F16", (8, 128 // group)),
        "language_model.a.bias": Stored("F16", (8,)),
        "mm_projector.0.weight": Stored("F16", (8, 8)),
    }
    counted = parts(quantized(full_size("0.5b"), settings), weights)
    assert counted["language_model"].parameters == 8 * 128 + 8
    assert counted["mm_projector"] == Part(parameters=64, size_bytes=128)
    assert counted["mm_projector"].bits_per_weight == 16
    assert (counted["vision_tower"].parameters, counted["vision_tower"].bits_per_weight) == (0, 0)


def test_memory_grows_with_the_area_and_the_stored_weights() -> None:
    config = full_size("0.5b")
    none, some = {}, {"vision_tower.a": Stored("F16", (1000,))}
    at = {side: question_memory(config, none, side).kept for side in (512, 1024)}
    assert 3.5 < at[1024] / at[512] < 4  # the tower's maps are four times as large, the text is the same
    assert question_memory(config, some, 512).kept - at[512] in (2000, 4000)  # float32 on a CPU


def test_a_single_question_on_a_cpu_holds_either_the_tower_or_the_decoder() -> None:
    config = full_size("0.5b")
    weights = {"vision_tower.a": Stored("F16", (10**8,)), "language_model.a": Stored("F16", (10**9,))}
    memory = question_memory(config, weights, 256)
    item = 4 if device() == "cpu" else 2
    spared = memory.kept - memory.once
    assert spared >= item * 10**8 if device() == "cpu" else spared == 0
