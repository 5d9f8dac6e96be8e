"""Quantized layers: as the config says, and on a CPU the same result by another way."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.config import LayerQuantization, QuantizationConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.cpu.quantized import DENSE_ROWS, CPUQuantizedEmbedding, CPUQuantizedLinear
from fastvlm_mlx.model.device import replace_quantized_layers
from fastvlm_mlx.model.quantized import quantize_layers

SETTINGS = [
    *(("affine", bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


@pytest.mark.parametrize(("mode", "bits", "group_size"), SETTINGS)
@pytest.mark.parametrize("rows", [1, 7])
def test_unpacking_gives_the_plain_product(mode: str, bits: int, group_size: int, rows: int) -> None:
    mx.random.seed(0)
    x = mx.random.normal((1, rows, 256))
    linear = nn.Linear(256, 40).to_quantized(group_size, bits, mode)
    embedding = nn.Embedding(50, 256).to_quantized(group_size, bits, mode)
    pairs = [
        (CPUQuantizedLinear.from_quantized(linear)(x), linear(x)),
        (CPUQuantizedEmbedding.from_quantized(embedding).as_linear(x), embedding.as_linear(x)),
        (CPUQuantizedEmbedding.from_quantized(embedding)(mx.array([[3, 49]])), embedding(mx.array([[3, 49]]))),
    ]
    for unpacked, packed in pairs:
        # 256 float32 products summed in another order
        tolerance = 2e-6 * float(mx.abs(packed).max())
        np.testing.assert_allclose(*(np.array(y.astype(mx.float32)) for y in (unpacked, packed)), atol=tolerance)


def test_large_layers_are_unpacked_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.model.cpu.quantized._BLOCK", 256 * 16)
    layer = nn.Linear(256, 40, bias=False).to_quantized(64, 4)
    x = mx.random.normal((8, 256))
    np.testing.assert_allclose(np.array(CPUQuantizedLinear.from_quantized(layer)(x)), np.array(layer(x)), atol=1e-5)


def eight_bits(group_size: int) -> QuantizationConfig:
    return QuantizationConfig(default=LayerQuantization(group_size=group_size, bits=8))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(64, 8)
        self.decoder = [nn.Embedding(5, 64), nn.Linear(64, 8, bias=False)]


def test_on_a_cpu_only_the_decoder_stays_packed() -> None:
    model = Two()
    quantize_layers(model, eight_bits(32), ["tower.scales", "decoder.0.scales", "decoder.1.scales"])
    packed = model.tower
    x = mx.random.normal((5, 64))
    expected = packed(x)
    replace_quantized_layers(model, "decoder", mx.float32)
    assert [type(layer) for layer in (model.tower, *model.decoder)] == [
        nn.Linear,
        CPUQuantizedEmbedding,
        CPUQuantizedLinear,
    ]
    np.testing.assert_allclose(np.array(model.tower(x)), np.array(expected), atol=1e-5)


def test_stored_layer_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.7 is stored quantized, but the model has no such linear"):
        quantize_layers(Two(), eight_bits(32), ["decoder.7.scales"])


def test_impossible_settings() -> None:
    """The layer has 64 inputs, which groups of 128 do not divide."""
    with pytest.raises(ConfigError, match=r"quantization with group_size 128, bits 8, mode affine is not possible"):
        quantize_layers(Two(), eight_bits(128), ["tower.scales"])


@pytest.mark.parametrize("rows", [1, DENSE_ROWS - 1])
@pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 4, 64), ("affine", 6, 32), ("mxfp4", 4, 32)])
def test_dealing_the_outputs_to_threads_changes_no_bit(mode: str, bits: int, group_size: int, rows: int) -> None:
    linear = nn.Linear(512, 1030)  # more than `_SPLIT` weights, and a number of outputs that 4 does not divide
    layer = nn.QuantizedLinear.from_linear(linear, group_size, bits, mode=mode)
    x = mx.random.normal((rows, 512))
    plain = layer(x)
    assert mx.array_equal(CPUQuantizedLinear.from_quantized(layer)(x), plain)
