"""The CPU in both roles: a sound model agrees with itself, and every fault is found and named where it is."""

from collections.abc import Callable, Iterator

import pytest
from mlx.utils import tree_map

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.graph import replaced
from fastvlm_mlx.doctor.agreement import (
    Probe,
    compare_batched,
    compare_compiled,
    compare_segments,
    compare_whole,
    weights_are_finite,
)
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import twin
from fastvlm_mlx.doctor.primitives import padded_masks, quantized_products, rotary_positions
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache

Loaded = tuple[FastVLM, FastVLMProcessor]


@pytest.fixture(scope="module")
def reference(loaded: Loaded) -> FastVLM:
    return twin(loaded[0], mx.float32, dequantize=True)


@pytest.fixture(scope="module")
def probe(loaded: Loaded) -> Probe:
    return Probe.of(loaded[1])


def wrong(checks: Iterator[Check]) -> list[str]:
    return [check.name for check in checks if check.ok is False]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_sound_model_agrees_with_itself(loaded: Loaded, reference: FastVLM, probe: Probe, dtype: mx.Dtype) -> None:
    candidate = twin(loaded[0], dtype)
    checks = list(compare_segments(candidate, reference, probe))
    layers = [f"layers.{number}" for number in range(len(candidate.language_model.layers))]
    stages = [f"stages.{number}" for number in range(5)]
    assert [check.name for check in checks] == ["stem", *stages, "conv_exp", "mm_projector", *layers, "head"]
    checks += [*compare_whole(candidate, reference, probe, 6), *compare_batched(candidate, probe)]
    checks += quantized_products(candidate)
    assert not [check for check in checks if not check.ok]


def double(weight: mx.array) -> mx.array:
    return weight * 2


def spoil(weight: mx.array) -> mx.array:
    flat = weight.reshape(-1)
    return mx.concatenate([mx.array([float("nan")], weight.dtype), flat[1:]]).reshape(weight.shape)


def transpose(weight: mx.array) -> mx.array:
    return weight.T


FAULTS: dict[str, Callable[[FastVLM], object]] = {
    "stem": lambda model: model.vision_tower.stem[2],
    "stages.1": lambda model: model.vision_tower.stages[1].downsample.proj,
    "stages.4": lambda model: model.vision_tower.stages[4].blocks[0].token_mixer.proj,
    "conv_exp": lambda model: model.vision_tower.conv_exp.se.expand,
    "mm_projector": lambda model: model.mm_projector[2],
    "layers.1": lambda model: model.language_model.layers[1].self_attn.o_proj,
}


@pytest.mark.parametrize("fault", [double, spoil, transpose])
@pytest.mark.parametrize("segment", FAULTS)
def test_a_fault_is_named_by_its_segment_alone(
    loaded: Loaded, reference: FastVLM, probe: Probe, segment: str, fault: Callable[[mx.array], mx.array]
) -> None:
    candidate = twin(loaded[0], mx.float32)
    layer = FAULTS[segment](candidate)
    layer.weight = fault(layer.weight)  # type: ignore[attr-defined]
    checks = list(compare_segments(candidate, reference, probe))
    assert wrong(iter(checks)) == [segment]
    assert any(check.ok is False for check in compare_whole(candidate, reference, probe, 2))


def test_a_nan_in_the_checkpoint_is_named_by_its_weight(loaded: Loaded, probe: Probe) -> None:
    """Both forms have it, so there is nothing to compare it with."""
    model = twin(loaded[0], mx.float32)
    layer = model.vision_tower.stages[2].blocks[0].conv_ffn.fc1
    layer.weight = spoil(layer.weight)
    assert wrong(weights_are_finite(model)) == ["vision_tower.stages.2.blocks.0.conv_ffn.fc1.weight"]
    assert wrong(compare_segments(twin(model, mx.float32), model, probe)) == ["stages.2"]
    assert not wrong(weights_are_finite(loaded[0]))


def test_what_overflows_float16_is_named(loaded: Loaded, probe: Probe) -> None:
    model = twin(loaded[0], mx.float32)
    layer = model.vision_tower.stages[3].blocks[0].conv_ffn.fc2
    layer.weight = layer.weight * 1e7
    (check,) = [c for c in compare_segments(twin(model, mx.float16), model, probe) if c.value == "not finite"][:1]
    assert (check.name, check.precision) == ("stages.3", "float16")
    assert "where the CPU has values up to" in check.reason


def test_one_offset_for_all_rows_in_the_place_of_one_for_each_is_found(loaded: Loaded) -> None:
    rope = mx.fast.rope
    assert not wrong(rotary_positions(loaded[0]))

    def first_only(x: mx.array, *arguments: object, offset: int | mx.array, **options: object) -> mx.array:
        return rope(x, *arguments, offset=offset if isinstance(offset, int) else offset[0], **options)

    with replaced(mx.fast, rope=first_only):
        assert wrong(rotary_positions(loaded[0])) == [
            "RoPE of 1 position, an offset for each row",
            "RoPE of 5 positions, an offset for each row",
        ]


def test_a_mask_that_forgets_the_padding_is_found(loaded: Loaded, probe: Probe) -> None:
    assert not wrong(padded_masks(loaded[0]))

    def forgets(self: KVCache, length: int, **_: object) -> str | None:
        return None if length == 1 else "causal"

    with replaced(KVCache, make_mask=forgets):
        assert wrong(padded_masks(loaded[0])) == ["mask of a prompt with padding", "mask of a step with padding"]
        assert wrong(compare_batched(twin(loaded[0], mx.float32), probe)) == ["batched rows against single"]


def test_a_quantized_product_that_is_off_is_found(loaded: Loaded) -> None:
    product = mx.quantized_matmul
    with replaced(mx, quantized_matmul=lambda *arguments, **options: 1.01 * product(*arguments, **options)):
        names = wrong(quantized_products(loaded[0]))
    assert "layers.0.mlp.down_proj, 4 bits, 8 rows" in names
    assert len(names) == 8  # two layers, two numbers of bits, one row and many


def test_a_compiled_tower_that_is_off_is_found(loaded: Loaded, probe: Probe) -> None:
    candidate = twin(loaded[0], mx.float32)
    with replaced(mx, compile=lambda function: function):
        assert not wrong(compare_compiled(candidate, probe))
    with replaced(mx, compile=lambda function: lambda x: function(x) * 1.001):
        assert wrong(compare_compiled(candidate, probe)) == ["compiled tower against eager"]


def test_a_twin_has_layers_of_its_own(loaded: Loaded) -> None:
    model = loaded[0]
    before = tree_map(lambda array: array, model.parameters())
    other = twin(model, mx.float32)
    other.vision_tower.conv_exp.se.expand.weight = mx.zeros_like(other.vision_tower.conv_exp.se.expand.weight)
    assert mx.array_equal(
        model.vision_tower.conv_exp.se.expand.weight, before["vision_tower"]["conv_exp"]["se"]["expand"]["weight"]
    )
