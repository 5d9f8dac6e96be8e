"""How many bits each layer gets: what can be asked for, and what it comes to for a model's layers."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from fastvlm_mlx.backend import nn
from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert.source.weights import Shape
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.model.fastvlm import FastVLM

PARTS = ("decoder", "embed", "projector", "vision")
"""What bits are chosen for: the decoder's layers, its embedding and head, the projector, the tower's linears."""

METHODS = ("rtn", "gptq")
AUTO = "auto"
AUTO_BITS = (3, 4, 5, 6, 8)
"""What `auto` chooses from."""
_AUTO_RANGE = AUTO_BITS[0], AUTO_BITS[-1]

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_MODES = {
    "affine": (_AFFINE_BITS, (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""The bits and the group sizes that MLX has for each mode, the usual one first."""


@dataclass(frozen=True)
class Preset:
    """Bits for each part.

    Attributes:
        bits: By part.
        sensitive: Bits for those layers of decoder and tower whose error weighs most.
    """

    bits: Mapping[str, int]
    sensitive: int | None = None


PRESETS = MappingProxyType(
    {
        "int8": Preset({"decoder": 8, "embed": 8, "projector": 8, "vision": 8}),
        "int4": Preset({"decoder": 4, "embed": 6, "projector": 8, "vision": 4}),
        "mixed_4_6": Preset({"decoder": 4, "embed": 6, "projector": 8, "vision": 4}, sensitive=6),
        "mixed_4_8": Preset({"decoder": 4, "embed": 8, "projector": 8, "vision": 4}, sensitive=8),
    }
)


@dataclass(frozen=True)
class Settings:
    """How one layer is quantized, in the order of mlx-lm's config entries."""

    group_size: int
    bits: int
    mode: str = "affine"

    @property
    def bits_per_weight(self) -> float:
        """With the 16-bit scale and bias of each group, or the 8-bit scale of the modes without bias."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What is asked for.

    Attributes:
        preset: One of `PRESETS`, or `auto`.
        bits: For all parts; instead of a preset.
        group_size: Weights that share a scale; by default the mode's usual one.
        mode: `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
        parts: Bits for single parts, 0 for none; in another mode than affine these parts are affine.
        target_bpw: Bits per weight that `auto` may use, over all layers that can be quantized.
        method: `rtn` rounds each weight to the nearest; `gptq` makes the following weights of a row compensate for the
            error, as measured on calibration inputs.

    Raises:
        ConversionError: If the combination is impossible.
    """

    preset: str | None = None
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    parts: Mapping[str, int] = field(default_factory=dict)
    target_bpw: float | None = None
    method: str = "rtn"

    def __post_init__(self) -> None:
        """Rejects what cannot be done, and says what can."""
        _one_of("mode", self.mode, _MODES)
        _one_of("method", self.method, METHODS)
        bits, group_sizes = _MODES[self.mode]
        if self.preset is not None:
            _one_of("preset", self.preset, (*PRESETS, AUTO))
            if self.bits is not None:
                raise ConversionError(f"preset {self.preset} sets the bits; leave either it or bits {self.bits} out")
            if self.mode != "affine":
                raise ConversionError(f"preset {self.preset} is affine; leave it out for mode {self.mode}")
        if (self.preset == AUTO) != (self.target_bpw is not None):
            raise ConversionError("preset auto and a target in bits per weight belong together; give both or neither")
        if self.target_bpw is not None:
            least, most = (Settings(self.group_size or group_sizes[0], end).bits_per_weight for end in _AUTO_RANGE)
            if not least <= self.target_bpw <= most:
                raise ConversionError(
                    f"target_bpw must be between {least:g} and {most:g}, what {_AUTO_RANGE[0]} and {_AUTO_RANGE[1]} "
                    f"bits come to with the scales of this group size, not {self.target_bpw:g}"
                )
            if chosen := [part for part, own in self.parts.items() if own]:
                raise ConversionError(f"preset auto chooses the bits of {chosen[0]}; only none can be asked for there")
        if self.bits is not None:
            _one_of(f"bits in mode {self.mode}", self.bits, bits)
        if self.group_size is not None:
            _one_of(f"group size in mode {self.mode}", self.group_size, sorted(group_sizes))
        for part, own in self.parts.items():
            _one_of("part", part, PARTS)
            _one_of(f"bits of {part}", own, (0, *_AFFINE_BITS))
        if self.method == "gptq" and self.mode != "affine":
            raise ConversionError(f"method gptq quantizes in mode affine, not {self.mode}; use rtn or mode affine")

    @property
    def name(self) -> str:
        """What it is called in reports."""
        bits = self.preset or f"{self.bits or _MODES[self.mode][0][-1]} bits"
        target = f" at {self.target_bpw:g} bits per weight" if self.target_bpw else ""
        mode = "" if self.mode == "affine" else f", {self.mode}"
        return f"{bits}{target}{mode}, {self.method}"

    def settings(self, path: str, depth: Mapping[str, int]) -> Settings | None:
        """Of one layer, whatever its size; None if it is not to be quantized.

        Args:
            path: In the module tree.
            depth: How many blocks tower and decoder have, by the prefix of their paths.
        """
        part = part_of(path)
        usual = self.group_size or _MODES[self.mode][1][0]
        affine_group = usual if usual in _MODES["affine"][1] else 32
        if part in self.parts:
            own = self.parts[part]
            return Settings(affine_group, own) if own else None
        if self.preset is None or self.preset == AUTO:
            bits = self.bits or _MODES[self.mode][0][-1]
            # MLX dequantizes an embedding to bfloat16 in every mode but affine.
            return Settings(affine_group, bits) if part == "embed" else Settings(usual, bits, self.mode)
        preset = PRESETS[self.preset]
        if preset.sensitive is not None and part in ("decoder", "vision") and is_sensitive(path, depth):
            return Settings(usual, preset.sensitive)
        return Settings(usual, preset.bits[part])

    def assign(self, config: ModelConfig) -> "Assignment":
        """What each layer of a model gets; for `auto`, what it starts from.

        Raises:
            ConversionError: If no layer can be quantized.
        """
        shapes = layer_shapes(config)
        depth = {
            "vision_tower": sum(config.vision_config.depths),
            "language_model": config.text_config.num_hidden_layers,
        }
        depths = config.vision_config.depths
        chosen: dict[str, Settings] = {}
        kept: dict[str, str] = {}
        for path, shape in shapes.items():
            settings = self.settings(_numbered(path, depths), depth)
            if settings is None:
                kept[path] = "not asked for"
            elif shape[-1] % settings.group_size:
                kept[path] = f"{shape[-1]} inputs, which groups of {settings.group_size} do not divide"
            else:
                chosen[path] = settings
        if not chosen:
            reasons = "; ".join(sorted(set(kept.values())))
            raise ConversionError(f"no layer of this checkpoint can be quantized like this: {reasons}")
        return Assignment(layers=chosen, kept=kept, shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each layer of a model gets.

    Attributes:
        layers: The settings of those that are quantized, by path.
        kept: Why the others are not.
        shapes: The weight of each, (out, in).
    """

    layers: Mapping[str, Settings]
    kept: Mapping[str, str]
    shapes: Mapping[str, Shape]

    def config(self) -> QuantizationConfig:
        """The settings as config.json records them."""
        return QuantizationConfig.of({path: LayerQuantization(**asdict(each)) for path, each in self.layers.items()})


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The weights of all layers that could be quantized, in the order of the module tree."""
    modules = dict(FastVLM(config).named_modules())
    shapes = {path: module.weight.shape for path, module in modules.items() if isinstance(module, _QUANTIZABLE)}
    return dict(sorted(shapes.items(), key=lambda item: _natural(item[0])))


_QUANTIZABLE = (nn.Linear, nn.Embedding)


def part_of(path: str) -> str:
    """Which of `PARTS` a layer belongs to."""
    if path.startswith("vision_tower."):
        return "vision"
    if path.startswith("mm_projector."):
        return "projector"
    return "decoder" if ".layers." in path else "embed"


def is_sensitive(path: str, depth: Mapping[str, int]) -> bool:
    """Whether a layer's error weighs most, by the rule of mlx-lm's mixed recipes, which are llama.cpp's.

    In the first and the last eighth of the blocks and in every third between, the layers that write the residual
    stream from the most inputs, and the values of attention; in the tower also what stands between the stages.

    Args:
        path: With the blocks of the tower numbered through.
        depth: How many blocks there are, by the prefix of `path`.
    """
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", path)
    if found is None:
        return True
    number, count = int(found[1]), depth[path.partition(".")[0]]
    outer = number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2
    return outer and path.endswith(("v_proj", "down_proj", "fc2", "qkv"))


def _numbered(path: str, depths: tuple[int, ...]) -> str:
    """The path with the tower's blocks numbered through all stages."""
    found = re.match(r"vision_tower\.stages\.(\d+)\.blocks\.(\d+)\.(.*)", path)
    if found is None:
        return path
    return f"vision_tower.blocks.{sum(depths[: int(found[1])]) + int(found[2])}.{found[3]}"


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(name), "") if name.isdecimal() else (-1, name) for name in path.split(".")]


def _one_of(what: str, value: Any, possible: Any) -> None:
    if value not in possible:
        raise ConversionError(f"{what} must be one of {', '.join(map(str, possible))}, not {value!r}")
