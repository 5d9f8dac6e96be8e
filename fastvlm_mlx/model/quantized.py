"""Which layers of a model are quantized, and how; read from and written to `config.json` as mlx-lm does.

On a GPU these are MLX's own layers. Its CPU backend multiplies one quantized row about as fast as memory delivers a
float32 one, but many rows no faster each; there the tower and the projector, which only ever see many, are held in
floating point, and the decoder unpacks a layer's weights for as long as it is at work on a prompt.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlx.utils import tree_map_with_path

from fastvlm_mlx.backend import device, mx, nn
from fastvlm_mlx.config import QuantizationConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.threads import cpu_threads

DENSE_ROWS = 4
"""From so many rows on, unpacking a layer costs less on a CPU than multiplying with it packed."""

_BLOCK = 2**22
"""Weights unpacked at a time."""

_SPLIT = 2**18
"""From so many weights on, a product with packed ones is worth dealing to several threads."""


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


def suit_device(model: nn.Module, decoder: str, dtype: mx.Dtype) -> None:
    """Rearranges a quantized model, its weights in place, for the device at hand; on a GPU it stays as it is.

    Args:
        model: Any module tree.
        decoder: The path of the part that sees one row at a time; all others see many.
        dtype: What the others are held in.
    """
    if device() != "cpu":
        return

    def suited(path: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return layer
        if isinstance(layer, nn.QuantizedEmbedding):
            return CPUQuantizedEmbedding(layer)
        return CPUQuantizedLinear(layer) if path.startswith(decoder) else _dense(layer, dtype)

    model.update_modules(tree_map_with_path(suited, model.leaf_modules(), is_leaf=nn.Module.is_module))


def _dense(layer: nn.QuantizedLinear, dtype: mx.Dtype) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    ).astype(dtype)
    if "bias" in layer:
        linear.bias = layer.bias
    return linear


class CPUQuantizedLinear(nn.QuantizedLinear):
    """A quantized linear that unpacks its weights to multiply many rows.

    Args:
        layer: What it takes the place of and shares its arrays with.
    """

    def __init__(self, layer: nn.QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        dict.update(self, layer)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, out)."""
        y = packed_product(x, self) if math.prod(x.shape[:-1]) < DENSE_ROWS else unpacked_product(x, self)
        return y + self.bias if "bias" in self else y


class CPUQuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding whose use as the head unpacks its weights to multiply many rows.

    Args:
        layer: What it takes the place of and shares its arrays with.
    """

    def __init__(self, layer: nn.QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = layer.group_size, layer.bits, layer.mode
        self.num_embeddings, self.dims = layer.num_embeddings, layer.dims
        dict.update(self, layer)
        self.freeze()

    def as_linear(self, x: mx.array) -> mx.array:
        """(…, D) -> (…, V)."""
        return packed_product(x, self) if math.prod(x.shape[:-1]) < DENSE_ROWS else unpacked_product(x, self)


def packed_product(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out), a part of the outputs on each CPU stream.

    MLX's CPU backend multiplies with quantized weights on the one thread of a stream.
    """
    outputs = layer.weight.shape[0]
    streams: Sequence[mx.Stream | None] = _streams() if outputs * x.shape[-1] >= _SPLIT else [None]
    products = []
    for part, stream in enumerate(streams):
        rows = slice(outputs * part // len(streams), outputs * (part + 1) // len(streams))
        biases = layer.biases[rows] if "biases" in layer else None
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        products.append(
            mx.quantized_matmul(x, layer.weight[rows], layer.scales[rows], biases, stream=stream, **settings)
        )
    return mx.concatenate(products, axis=-1) if len(products) > 1 else products[0]


@functools.cache
def _streams() -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(cpu_threads())]


def unpacked_product(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` times the transposed weights, (…, in) -> (…, out), with only a block of the weights unpacked at a time."""
    step = max(1, _BLOCK // x.shape[-1])
    products = []
    for first in range(0, layer.weight.shape[0], step):
        rows = slice(first, first + step)
        biases = layer.biases[rows] if "biases" in layer else None
        settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        slices = column_slices(layer.weight[rows], layer.scales[rows], biases, **settings)
        terms = [x[..., index :: len(slices)] @ columns.astype(x.dtype).T for index, columns in enumerate(slices)]
        products.append(functools.reduce(mx.add, terms))
    return mx.concatenate(products, axis=-1) if len(products) > 1 else products[0]


def column_slices(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> list[mx.array]:
    """Dequantized weights (out, in) as slices of their columns: each n-th, beginning with 0, 1, …, n - 1.

    MLX packs affine weights as one stream of bits, n of them into the fewest whole bytes. Each of the n has its own
    shifts, and columns that share them are taken together; MLX's own function takes each weight by itself, several
    times slower on a CPU.
    """
    if mode != "affine" or biases is None:
        return [mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)]
    return _unpack(bits)(weight, scales, biases)


@functools.cache
def _unpack(bits: int) -> Callable[..., list[mx.array]]:
    """`column_slices` of affine weights, as one fused function."""
    together = 8 // math.gcd(8, bits)
    mask = 2**bits - 1

    def unpack(weight: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        rows, groups = scales.shape
        stream = weight.view(mx.uint8).reshape(rows, groups, -1, together * bits // 8)
        slices = []
        for index in range(together):
            byte, shift = divmod(index * bits, 8)
            values = stream[..., byte] >> shift
            if shift + bits > 8:
                values = values | (stream[..., byte + 1] << (8 - shift))
            values = (values & mask).astype(scales.dtype)
            slices.append((values * scales[..., None] + biases[..., None]).reshape(rows, -1))
        return slices

    return mx.compile(unpack)
