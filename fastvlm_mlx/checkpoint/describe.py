"""What a checkpoint holds, and how much memory a question takes, from names, dtypes and shapes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastvlm_mlx.backend import compute_dtype, device
from fastvlm_mlx.checkpoint.folder import checked_files
from fastvlm_mlx.checkpoint.safetensors import read_header
from fastvlm_mlx.config import ModelConfig

PARTS = ("vision_tower", "mm_projector", "language_model")
"""The parts of a model, by the prefixes of their parameters."""

_GROUP_SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""MLX's group size for each mode, where the config names none."""

_TEXT_POSITIONS = 512
"""Positions besides the image that the memory estimate allows for: the prompt and an answer."""

_TOWER_MAPS = 7
"""Peak memory of the tower in units of its widest map, (R/4)² x 4·C: 6.1 to 6.7 measured on the CPU backend."""

_FLOATING = ("F16", "BF16", "F32")


class Stored(Protocol):
    """A tensor as a file holds it; its dtype has safetensors' name."""

    @property
    def dtype(self) -> str:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model on disk.

    Attributes:
        parameters: The number of weights; those of a quantized layer count as the weights they stand for.
        size_bytes: The bytes of its tensors.
    """

    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """The average; 0 for a part without weights."""
        return round(8 * self.size_bytes / self.parameters, 2) if self.parameters else 0.0


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a converted folder, from the headers.

    Raises:
        CheckpointError: If a file is missing, truncated or no safetensors file.
    """
    return {tensor.name: tensor for file in checked_files(folder) for tensor in read_header(file)}


def parts(config: ModelConfig, weights: Mapping[str, Stored]) -> dict[str, Part]:
    """Size and number of weights of each part; see `PARTS`."""
    return {part: _part(part, config, weights) for part in PARTS}


def _part(name: str, config: ModelConfig, weights: Mapping[str, Stored]) -> Part:
    parameters = size = 0
    for path, value in weights.items():
        if not path.startswith(f"{name}."):
            continue
        size += value.nbytes
        layer, _, leaf = path.rpartition(".")
        if f"{layer}.scales" not in weights or leaf == "bias":
            parameters += math.prod(value.shape)
        elif leaf == "scales":
            parameters += math.prod(value.shape) * _group_size(config, layer)
    return Part(parameters=parameters, size_bytes=size)


def _group_size(config: ModelConfig, layer: str) -> int:
    """How many weights of a quantized layer share a scale."""
    if config.quantization is None:
        return 1
    settings = config.quantization.for_layer(layer)
    return settings.group_size or _GROUP_SIZES.get(settings.mode, 1)


@dataclass(frozen=True, kw_only=True)
class QuestionMemory:
    """About how many bytes a question about one image takes at its peak on this device.

    Attributes:
        kept: In a program that keeps the whole model loaded: weights, the tower's maps and the KV cache.
        once: In `fastvlm generate`, which on a CPU reads the tower first, frees it, and then reads the decoder.
    """

    kept: int
    once: int


def question_memory(config: ModelConfig, weights: Mapping[str, Stored], resolution: int) -> QuestionMemory:
    """Estimates the memory of a question about one image, `resolution` pixels per side."""
    item = compute_dtype(config.dtype).size
    loaded = {
        part: sum(
            math.prod(value.shape) * item if value.dtype in _FLOATING else value.nbytes
            for path, value in weights.items()
            if path.startswith(f"{part}.")
        )
        for part in PARTS
    }
    vision, text = config.vision_config, config.text_config
    maps = _TOWER_MAPS * (resolution // 4) ** 2 * vision.mlp_ratio * vision.embed_dims[0] * item
    positions = (resolution // vision.patch_size) ** 2 + _TEXT_POSITIONS
    kv_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * item * positions
    kept = sum(loaded.values()) + maps + kv_cache
    tower = loaded["vision_tower"]
    return QuestionMemory(kept=kept, once=max(tower + maps, kept - tower - maps) if device() == "cpu" else kept)
