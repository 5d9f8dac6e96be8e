"""Arranges a loaded model for the device that it runs on."""

import functools
from collections.abc import Callable
from typing import Any

from mlx.utils import tree_map_with_path

from fastvlm_mlx import kernels
from fastvlm_mlx.backend import blas_threads, device, mx, nn
from fastvlm_mlx.model.activations import gelu
from fastvlm_mlx.model.cpu.quantized import CPUQuantizedEmbedding, CPUQuantizedLinear
from fastvlm_mlx.model.cpu.vision import CPUTower, store_by_hidden_unit
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.quantized import dequantized
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.streams import turn


def prepare(model: FastVLM) -> FastVLM:
    """Returns `model` itself, arranged in place for MLX's default device.

    On a GPU the tower is compiled. A CPU gets the tower in another formulation, a tower and a projector without
    quantized weights, and a decoder whose quantized layers suit both a prompt and a single position. Nothing is
    computed yet: weights that are read when they are first used still are. Call it again after changing the weights or
    layers of the model.
    """
    with turn():
        if device() == "cpu":
            replace_quantized_layers(model, "language_model", model.dtype)
        model.tower = prepare_tower(model.vision_tower)
    return model


def prepare_tower(tower: FastViTHD) -> "PreparedTower":
    """The tower, which has no quantized weights on a CPU, in the form that suits the device."""
    with turn():
        if device() == "gpu":
            return PreparedTower(tower, mx.compile(tower), waits=False)
        check_compiler()
        if tower.stem[0].bias.dtype != mx.float32:
            return PreparedTower(tower, tower, waits=False)
        store_by_hidden_unit(tower)
        return PreparedTower(tower, CPUTower(tower), waits=True)


@functools.cache
def check_compiler() -> None:
    """Turns MLX's compiler off where its kernels cannot be built or loaded; tries the one that every model needs."""
    try:
        if kernels.is_usable():
            mx.eval(gelu(mx.zeros(1)))
            return
    except RuntimeError:  # of the C++ compiler or of the loader, whatever the reason
        pass
    mx.disable_compile()


class PreparedTower:
    """The tower in the form that suits the device: pixel values (B, R, R, 3) -> features (B, R/64, R/64, C).

    Args:
        tower: Its weights are read before the first image; a compiled function would read them at every call.
        run: The same function.
        waits: Whether features are evaluated at once, with one BLAS thread for each of the streams.
    """

    def __init__(self, tower: FastViTHD, run: Callable[[mx.array], mx.array], *, waits: bool) -> None:
        self._tower = tower
        self._run = run
        self._is_read = False
        self._waits = waits

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are arranged anew, for the device where they are made."""
        return prepare_tower, (self._tower,)

    def __call__(self, x: mx.array, on_submit: Callable[[], None] | None = None) -> mx.array:
        """Features; if it waits for them, it calls `on_submit` when the work is queued."""
        if not self._is_read:
            mx.eval(self._tower.parameters())
            self._is_read = True
        if not self._waits:
            return self._run(x)
        with blas_threads(1):
            features = self._run(x)
            if on_submit:
                on_submit()
            mx.eval(features)
        return features


def replace_quantized_layers(model: nn.Module, decoder: str, dtype: mx.Dtype) -> None:
    """Replaces quantized layers, in place, by those that suit a CPU.

    Args:
        model: Any module tree.
        decoder: The path of the part that sees single rows; all others see many.
        dtype: Of the others' weights, in floating point.
    """

    def replaced(path: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.QuantizedEmbedding):
            return CPUQuantizedEmbedding.from_quantized(layer)
        if isinstance(layer, nn.QuantizedLinear):
            is_decoder = path.startswith(decoder)
            return CPUQuantizedLinear.from_quantized(layer) if is_decoder else dequantized(layer, dtype)
        return layer

    model.update_modules(tree_map_with_path(replaced, model.leaf_modules(), is_leaf=nn.Module.is_module))
