"""The two forms of a model: the one that a GPU runs, and the one for CPUs, as the reference.

Where there is no GPU, the CPU runs both: the modules as they are, and the formulation for CPUs.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from fastvlm_mlx.backend import device, mx, nn
from fastvlm_mlx.bench.graph import replaced
from fastvlm_mlx.model import activations, language
from fastvlm_mlx.model.cpu.vision import CPUTower
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.quantized import dequantized
from fastvlm_mlx.streams import turn

Segment = Callable[[mx.array], mx.array]


@contextmanager
def on_cpu() -> Iterator[None]:
    """Runs what is inside on the CPU, in the formulation for CPUs."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with turn():
            yield
    finally:
        mx.set_default_device(before)


@contextmanager
def on_device() -> Iterator[None]:
    """Runs what is inside on the default device, in the formulation for GPUs."""
    with ExitStack() as stack:
        for module in (activations, language):
            stack.enter_context(replaced(module, device=lambda: "gpu"))
        stack.enter_context(turn())
        yield


def roles() -> str:
    """What is compared with what on this machine."""
    return "GPU against CPU" if device() == "gpu" else "a GPU's modules against the formulation for CPUs, on the CPU"


def rounds_to_tf32() -> bool:
    """Whether the device multiplies float32 matrices in TF32, with 10 bits after the point."""
    return device() == "gpu" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def twin(model: FastVLM, dtype: mx.Dtype, *, dequantize: bool = False) -> FastVLM:
    """A model with the same weights and layers of its own; shares the arrays that need no cast.

    Args:
        model: Stays as it is.
        dtype: Of the weights, and of what it computes in.
        dequantize: Whether it gets plain layers in the place of quantized ones.
    """

    def own(_: str, layer: nn.Module) -> nn.Module:
        if dequantize and isinstance(layer, nn.QuantizedLinear):
            return dequantized(layer, dtype)
        if dequantize and isinstance(layer, nn.QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
            plain.weight = dequantized(layer, dtype).weight
            return plain
        return copy.copy(layer)

    def cast(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    with turn():
        made = FastVLM(model.config)
        made.update_modules(tree_map_with_path(own, model.leaf_modules(), is_leaf=nn.Module.is_module))
        made.update(tree_map(cast, made.parameters()))
        made.eval()
        mx.eval(made.parameters())
    return made


def device_segments(model: FastVLM) -> dict[str, Segment]:
    """The tower's segments and the projector, by name, as a GPU runs them; use them within `on_device`."""
    return {**model.vision_tower.segments(), "mm_projector": functools.partial(_project, model)}


def cpu_segments(model: FastVLM) -> dict[str, Segment]:
    """The tower's segments and the projector, by name, in the form for CPUs; use them within `on_cpu`."""
    return {**CPUTower(model.vision_tower).segments(), "mm_projector": functools.partial(_project, model)}


def _project(model: FastVLM, features: mx.array) -> mx.array:
    return model.mm_projector(features.reshape(features.shape[0], -1, features.shape[-1]))


def decoder_segments(model: FastVLM) -> dict[str, Segment]:
    """The decoder's blocks (B, L, D) -> (B, L, D) and its head (B, L, D) -> logits (B, V), by name."""
    decoder = model.language_model
    blocks: dict[str, Segment] = {
        f"layers.{number}": functools.partial(layer, mask="causal") for number, layer in enumerate(decoder.layers)
    }
    return {**blocks, "head": lambda x: decoder.head(decoder.model.norm(x[:, -1:]))[:, -1]}


def parameters(model: FastVLM) -> dict[str, mx.array]:
    """Every weight by its name."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)
