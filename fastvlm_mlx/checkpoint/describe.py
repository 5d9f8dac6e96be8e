"""What a converted checkpoint holds, and how much memory a question takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.backend import compute_dtype, mx
from fastvlm_mlx.config import ModelConfig

PARTS = ("vision_tower", "mm_projector", "language_model")
"""The parts of a model, by the prefixes of their parameters."""

_GROUP_SIZES = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""MLX's group size for each mode, where the config names none."""

_TEXT_POSITIONS = 512
"""Positions besides the image that the memory estimate allows for: the prompt and an answer."""

_TOWER_MAPS = 7
"""Peak memory of the tower in units of its widest map, (R/4)² x 4·C: 6.1 to 6.7 measured on the CPU backend."""


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


def folder_bytes(folder: Path) -> int:
    """The bytes of the files in a folder, without its subfolders."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def parts(config: ModelConfig, weights: Mapping[str, mx.array]) -> dict[str, Part]:
    """Size and number of weights of each part; see `PARTS`."""
    return {part: _part(part, config, weights) for part in PARTS}


def _part(name: str, config: ModelConfig, weights: Mapping[str, mx.array]) -> Part:
    parameters = size = 0
    for path, value in weights.items():
        if not path.startswith(f"{name}."):
            continue
        size += value.nbytes
        layer, _, leaf = path.rpartition(".")
        if f"{layer}.scales" not in weights or leaf == "bias":
            parameters += value.size
        elif leaf == "scales":
            parameters += value.size * _group_size(config, layer)
    return Part(parameters=parameters, size_bytes=size)


def _group_size(config: ModelConfig, layer: str) -> int:
    """How many weights of a quantized layer share a scale."""
    if config.quantization is None:
        return 1
    settings = config.quantization.for_layer(layer)
    return settings.group_size or _GROUP_SIZES.get(settings.mode, 1)


def question_memory(config: ModelConfig, weights: Mapping[str, mx.array], resolution: int) -> int:
    """About how many bytes a question about one image takes on this device: weights, the tower's maps, KV cache."""
    item = compute_dtype(config.dtype).size
    loaded = sum(w.size * item if mx.issubdtype(w.dtype, mx.floating) else w.nbytes for w in weights.values())
    vision, text = config.vision_config, config.text_config
    widest_map = (resolution // 4) ** 2 * vision.mlp_ratio * vision.embed_dims[0] * item
    positions = (resolution // vision.patch_size) ** 2 + _TEXT_POSITIONS
    kv_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * item * positions
    return loaded + _TOWER_MAPS * widest_map + kv_cache
