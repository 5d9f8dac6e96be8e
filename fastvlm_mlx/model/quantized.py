"""Layers with quantized weights, as a checkpoint stores them."""

from collections.abc import Iterable
from typing import Any

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.config import QuantizationConfig
from fastvlm_mlx.errors import ConfigError


def quantize_layers(model: nn.Module, quantization: QuantizationConfig, stored: Iterable[str]) -> None:
    """Replaces the layers of `model` that a checkpoint stores quantized by quantized ones, in place.

    Args:
        model: Any module tree with linears and embeddings.
        quantization: Of every layer.
        stored: The names of the checkpoint's tensors; a layer is quantized if its `scales` are among them.

    Raises:
        ConfigError: If what is stored names a layer that cannot be quantized, or the settings are impossible.
    """
    paths = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    modules = dict(model.named_modules())
    if unknown := sorted(path for path in paths if not hasattr(modules.get(path), "to_quantized")):
        raise ConfigError(f"{unknown[0]} is stored quantized, but the model has no such linear or embedding")

    def settings(path: str, _: nn.Module) -> bool | dict[str, Any]:
        return path in paths and quantization.for_layer(path).to_dict()

    try:
        nn.quantize(model, class_predicate=settings)
    except (ValueError, TypeError) as err:
        raise ConfigError(f"quantization with {quantization.default} is not possible: {err}") from err


def dequantized(layer: nn.QuantizedLinear | nn.QuantizedEmbedding, dtype: mx.Dtype) -> nn.Linear:
    """A linear that computes the same with weights in floating point; of an embedding, the head that it is."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    ).astype(dtype)
    if "bias" in layer:
        linear.bias = layer.bias
    return linear
