"""Computes the cost of an answer on a GPU by part: FLOPs, bytes, kernels, and the least time on a chip."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from mlx.utils import tree_map

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.graph import Function, Kernel, count_launches, kernels
from fastvlm_mlx.checkpoint.fusing import fused_names, stored_in_parts
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.quantized import quantize_layers

PROMPT_TEXT_TOKENS = 24
"""Tokens of the default prompt apart from the visual ones."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one part of an answer at one resolution.

    Attributes:
        part: `vision tower`, `projector`, `prefill` (of the whole prompt) or `decode step` (after it).
        resolution: In pixels.
        kernels: Those launched when everything is fused that can be; FLOPs and bytes are theirs.
        eager: Number of launches in MLX's own graph without `mx.compile`; None where MLX cannot compile.
        compiled: Number of launches in MLX's own graph with `mx.compile`; None where MLX cannot compile.
    """

    part: str
    resolution: int
    kernels: tuple[Kernel, ...]
    eager: int | None
    compiled: int | None

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes that are read and written."""
        return sum(kernel.bytes for kernel in self.kernels)

    def roofline(self, chip: "Chip") -> float:
        """Returns the least seconds on a chip: each kernel's arithmetic or memory traffic, whichever takes longer."""
        return sum(
            max(kernel.flops / (chip.tflops * 1e12), kernel.bytes / (chip.bandwidth_gb_s * 1e9))
            for kernel in self.kernels
        )


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published peaks of a chip's GPU, which are not measured here.

    Attributes:
        name: The maker's name for it.
        tflops: 10¹² floating-point operations per second.
        bandwidth_gb_s: Memory bandwidth in 10⁹ bytes per second.
    """

    name: str
    tflops: float
    bandwidth_gb_s: float


def chips() -> tuple[tuple[Chip, ...], str]:
    """Returns the chips in `chips.json` and the sources of its figures."""
    data = json.loads(files("fastvlm_mlx.bench").joinpath("chips.json").read_text(encoding="utf-8"))
    sources = "; ".join(f"{name}: {source}" for name, source in data["sources"].items())
    return tuple(Chip(**chip) for chip in data["chips"]), f"{data['note']} {sources}."


def costs(config: ModelConfig, resolutions: Sequence[int], tensor_names: Iterable[str] = ()) -> list[Cost]:
    """Returns the cost of every part at every resolution, in the dtype of the checkpoint; runs no model.

    Args:
        config: The architecture.
        resolutions: In pixels.
        tensor_names: Of the checkpoint; needed if it is quantized.
    """
    model = FastVLM(config)
    if config.quantization:
        names = fused_names(list(tensor_names), config.quantization)
        model.language_model.split(path.removeprefix("language_model.") for path in stored_in_parts(names))
        quantize_layers(model, config.quantization, names)
    dtype = getattr(mx, config.dtype)

    def blank(array: mx.array) -> mx.array:
        return _blank(array.shape, dtype if mx.issubdtype(array.dtype, mx.floating) else array.dtype)

    parameters = {part: tree_map(blank, model[part].parameters()) for part in ("vision_tower", "language_model")}
    parameters["mm_projector"] = [tree_map(blank, layer.parameters()) for layer in model.mm_projector]
    parts = []
    for side in resolutions:
        tokens = (side // config.vision_config.patch_size) ** 2
        features = _blank((1, tokens, config.vision_config.hidden_size), dtype)
        prompt = _blank((1, tokens + PROMPT_TEXT_TOKENS, config.text_config.hidden_size), dtype)
        cases: tuple[tuple[str, Function, Any], ...] = (
            ("vision tower", _tower(model), (parameters["vision_tower"], _blank((1, side, side, 3), dtype))),
            ("projector", _projector(model), (parameters["mm_projector"], features)),
            ("prefill", _prefill(model), (parameters["language_model"], prompt)),
            ("decode step", _step(model), (parameters["language_model"], *_past(config, prompt.shape[1], dtype))),
        )
        for part, function, inputs in cases:
            parts.append(
                Cost(
                    part=part,
                    resolution=side,
                    kernels=tuple(kernels(function, *inputs)),
                    eager=count_launches(function, *inputs, compiled=False),
                    compiled=count_launches(function, *inputs, compiled=True),
                )
            )
    return parts


def _blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Returns an array that takes no memory."""
    return mx.broadcast_to(mx.array(0, dtype), shape)


def _tower(model: FastVLM) -> Function:
    def run(parameters: Any, pixels: mx.array) -> mx.array:
        model.vision_tower.update(parameters)
        return model.vision_tower(pixels)

    return run


def _projector(model: FastVLM) -> Function:
    def run(parameters: Any, features: mx.array) -> mx.array:
        for layer, values in zip(model.mm_projector, parameters, strict=True):
            layer.update(values)
        return model.mm_projector(features)

    return run


def _prefill(model: FastVLM) -> Function:
    def run(parameters: Any, embeddings: mx.array) -> mx.array:
        model.language_model.update(parameters)
        logits = model.language_model.prefill(embeddings, model.language_model.make_cache())
        return mx.argmax(logits, axis=-1)

    return run


def _past(config: ModelConfig, positions: int, dtype: mx.Dtype) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """Returns a token and the keys and values of the positions before it, with room for more."""
    text = config.text_config
    shape = (1, text.num_key_value_heads, positions + KVCache.step, text.head_dim)
    layers = range(text.num_hidden_layers)
    return _blank((1, 1), mx.int32), [_blank(shape, dtype) for _ in layers], [_blank(shape, dtype) for _ in layers]


def _step(model: FastVLM) -> Function:
    def run(parameters: Any, token: mx.array, keys: list[mx.array], values: list[mx.array]) -> mx.array:
        model.language_model.update(parameters)
        cache = model.language_model.make_cache()
        for layer, key, value in zip(cache, keys, values, strict=True):
            # Views, because the cache is written in place and inputs of a graph must not be.
            layer.keys, layer.values, layer.offset = key[...], value[...], key.shape[2] - KVCache.step
        logits = model.language_model(token, cache)
        return mx.argmax(logits[:, -1], axis=-1)

    return run


def cost_table(parts: Sequence[Cost]) -> list[list[str]]:
    """Returns a header and one line for each part and resolution."""
    lines = [["part", "px", "GFLOP", "MB moved", "kernels", "compiled", "FLOP/byte"]]
    for cost in parts:
        lines.append(
            [
                cost.part,
                str(cost.resolution),
                f"{cost.flops / 1e9:.3g}" if cost.flops < 1e11 else f"{cost.flops / 1e9:.0f}",
                f"{cost.bytes / 1e6:.0f}",
                "-" if cost.eager is None else str(cost.eager),
                "-" if cost.compiled is None else str(cost.compiled),
                f"{cost.flops / cost.bytes:.1f}",
            ]
        )
    return lines


def roofline_table(parts: Sequence[Cost], peaks: Sequence[Chip]) -> list[list[str]]:
    """Returns a header and one line for each chip: least milliseconds to the first token, most tokens per second."""
    sides = list(dict.fromkeys(cost.resolution for cost in parts))
    lines = [["chip", "TFLOPS", "GB/s", *(f"TTFT {side} px" for side in sides), "of it tower", "tokens/s"]]
    for chip in peaks:
        times = {(cost.part, cost.resolution): cost.roofline(chip) for cost in parts}
        first = [sum(times[part, side] for part in ("vision tower", "projector", "prefill")) for side in sides]
        lines.append(
            [
                chip.name,
                f"{chip.tflops:g}",
                f"{chip.bandwidth_gb_s:g}",
                *(f"{1000 * seconds:.1f} ms" for seconds in first),
                f"{times['vision tower', sides[-1]] / first[-1]:.0%}",
                f"{1 / times['decode step', sides[-1]]:.0f}",
            ]
        )
    return lines
