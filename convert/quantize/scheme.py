"""Quantization requests, and the bits and group size that they give every layer of a model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastvlm_mlx.arguments import as_real, as_whole
from fastvlm_mlx.config import QUANTIZATION_MODES, LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert.arrays import Shape
from fastvlm_mlx.convert.fold.modules import parameter_shapes
from fastvlm_mlx.convert.parts import PARTS, part_of
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import names
from fastvlm_mlx.schema import shown

METHODS = ("rtn", "gptq")
AUTO = "auto"
AUTO_BITS = (3, 4, 5, 6, 8)
"""The bits that `auto` chooses from."""
_AUTO_RANGE = AUTO_BITS[0], AUTO_BITS[-1]

_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Preset:
    """Bits for each part.

    Attributes:
        bits: By part.
        sensitive: Bits for the layers of decoder and tower whose error matters most.
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


@dataclass(frozen=True, kw_only=True)
class LayerScheme(LayerQuantization):
    """How one layer is going to be quantized: a `LayerQuantization` that leaves nothing to the mode's defaults."""

    group_size: int
    bits: int

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Bits per weight, with each group's scale and bias of `scale_bits`, or the 8-bit scale of other modes."""
        return self.bits + (2 * scale_bits if self.mode == "affine" else 8) / self.group_size


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantization request.

    Attributes:
        preset: One of `PRESETS`, or `auto`.
        bits: Bits for all parts, instead of a preset.
        group_size: Weights that share a scale; by default the mode's usual number.
        mode: `affine`, `mxfp4`, `mxfp8` or `nvfp4`.
        parts: Bits for single parts, 0 for none; these parts are affine in every mode.
        target_bpw: Bits per weight that `auto` may use over the layers that it quantizes, scales and biases included.
        method: `rtn` rounds each weight to the nearest level; `gptq` makes the following weights of a row compensate
            for the error, as measured on calibration inputs.

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
        """Rejects impossible combinations and names the possible ones; None becomes the default."""
        defaults = {"mode": "affine", "method": "rtn", "parts": {}}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if not isinstance(self.parts, Mapping):
            raise ConversionError(f"parts must map parts to bits, not {shown(self.parts)}")
        object.__setattr__(self, "parts", {part: _plain(bits) for part, bits in self.parts.items()})
        for name in ("bits", "group_size"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if self.target_bpw is not None and math.isnan(as_real(self.target_bpw)):
            raise ConversionError(f"target_bpw must be a number, not {shown(self.target_bpw)}")
        _one_of("mode", self.mode, QUANTIZATION_MODES)
        _one_of("method", self.method, METHODS)
        bits, group_sizes = QUANTIZATION_MODES[self.mode]
        if self.preset is not None:
            _one_of("preset", self.preset, (*PRESETS, AUTO))
            if self.bits is not None:
                raise ConversionError(f"preset {self.preset} sets the bits; leave either it or bits {self.bits} out")
            if self.mode != "affine":
                raise ConversionError(f"preset {self.preset} is affine; leave it out for mode {self.mode}")
        if (self.preset == AUTO) != (self.target_bpw is not None):
            raise ConversionError("preset auto and a target in bits per weight belong together; give both or neither")
        if self.target_bpw is not None:
            self._check_target()
            if chosen := [part for part, bits in self.parts.items() if bits]:
                raise ConversionError(f"preset auto chooses the bits of {chosen[0]}; only none is possible there")
        if self.bits is not None:
            _one_of(f"bits in mode {self.mode}", self.bits, bits)
        if self.group_size is not None:
            _one_of(f"group size in mode {self.mode}", self.group_size, sorted(group_sizes))
        for part, part_bits in self.parts.items():
            _one_of("part", part, PARTS)
            _one_of(f"bits of {part}", part_bits, (0, *_AFFINE_BITS))
        if self.method == "gptq" and self.mode != "affine":
            raise ConversionError(f"method gptq quantizes in mode affine, not {self.mode}; use rtn or mode affine")

        if self._all_parts and any(self.parts.values()):
            mode = None if self.mode == "affine" else self.mode
            for name, value in {"preset": self.preset, "bits": self.bits, "mode": mode}.items():
                if value is not None:
                    raise ConversionError(
                        f"every part has bits of its own, so {name} {value} would change nothing; leave it out"
                    )

    def _check_target(self, scale_bits: int = 16) -> None:
        """Raises if no choice of bits comes to the target."""
        assert self.target_bpw is not None
        group_size = self.group_size or QUANTIZATION_MODES[self.mode][1][0]
        least, most = (LayerScheme(group_size=group_size, bits=end).bits_per_weight(scale_bits) for end in _AUTO_RANGE)
        if not least <= as_real(self.target_bpw) <= most:
            raise ConversionError(
                f"target_bpw must be between {least:g} and {most:g}, what {_AUTO_RANGE[0]} and {_AUTO_RANGE[1]} "
                f"bits come to with the scales of this group size, not {shown(self.target_bpw)}"
            )
        object.__setattr__(self, "target_bpw", as_real(self.target_bpw))

    @property
    def _all_parts(self) -> bool:
        """Whether every part has bits of its own."""
        return len(self.parts) == len(PARTS)

    @property
    def name(self) -> str:
        """Its name in reports."""
        words = [] if self._all_parts else [self.preset or f"{self.bits or QUANTIZATION_MODES[self.mode][0][-1]} bits"]
        if self.target_bpw is not None:
            words = [f"{words[0]} at {self.target_bpw:g} bits per weight"]
        if self.mode != "affine":
            words.append(self.mode)
        words += [f"{part} {self.parts[part] or 'none'}" for part in PARTS if part in self.parts]
        if self.group_size is not None:
            words.append(f"groups of {self.group_size}")
        return ", ".join([*words, self.method])

    def for_layer(self, path: str, depth: Mapping[str, int]) -> LayerScheme | None:
        """The scheme of one layer, whatever its size; None if it is not to be quantized.

        Args:
            path: Its path in the module tree, with the blocks of the tower numbered through.
            depth: The number of blocks of tower and decoder, by the prefix of their paths.
        """
        part = part_of(path)
        usual = self.group_size or QUANTIZATION_MODES[self.mode][1][0]
        affine_group = usual if usual in QUANTIZATION_MODES["affine"][1] else 32
        if part in self.parts:
            bits = self.parts[part]
            return LayerScheme(group_size=affine_group, bits=bits) if bits else None
        if self.preset is None or self.preset == AUTO:
            bits = self.bits or QUANTIZATION_MODES[self.mode][0][-1]
            # MLX dequantizes an embedding to bfloat16 in every mode but affine.
            if part == "embed":
                return LayerScheme(group_size=affine_group, bits=bits)
            return LayerScheme(group_size=usual, bits=bits, mode=self.mode)
        preset = PRESETS[self.preset]
        if preset.sensitive is not None and part in ("decoder", "vision") and is_sensitive(path, depth):
            return LayerScheme(group_size=usual, bits=preset.sensitive)
        return LayerScheme(group_size=usual, bits=preset.bits[part])

    def allocate(self, config: ModelConfig) -> "BitAllocation":
        """The bits and group size of every layer of a model; for `auto`, those that it starts from.

        Raises:
            ConversionError: If no layer can be quantized.
        """
        shapes = layer_shapes(config)
        depth = {
            "vision_tower": sum(config.vision_config.depths),
            "language_model": config.text_config.num_hidden_layers,
        }
        depths = config.vision_config.depths
        layers: dict[str, LayerScheme] = {}
        kept: dict[str, str] = {}
        for path, shape in shapes.items():
            scheme = self.for_layer(_numbered(path, depths), depth)
            if scheme is None:
                kept[path] = "not requested"
            elif shape[-1] % scheme.group_size:
                kept[path] = f"{shape[-1]} inputs, which groups of {scheme.group_size} do not divide"
            else:
                layers[path] = scheme
        if not layers:
            reasons = "; ".join(sorted(set(kept.values())))
            raise ConversionError(f"no layer of this checkpoint can be quantized like this: {reasons}")
        allocation = BitAllocation(
            layers=layers, kept=kept, shapes=shapes, scale_bits=32 if config.dtype == "float32" else 16
        )
        if self.target_bpw is not None:
            self._check_target(allocation.scale_bits)
        if self.method == "gptq" and not allocation.linears:
            raise ConversionError("method gptq leaves embedding and head as they are, and no other layer is quantized")
        return allocation


@dataclass(frozen=True, kw_only=True)
class BitAllocation:
    """Bits and group size of every layer.

    Attributes:
        layers: The schemes of the layers that are quantized, by path.
        kept: The reasons why the others are not.
        shapes: The shape of each layer's weight, (out, in).
        scale_bits: Bits of each scale and bias in mode affine: those of the checkpoint's dtype.
    """

    layers: Mapping[str, LayerScheme]
    kept: Mapping[str, str]
    shapes: Mapping[str, Shape]
    scale_bits: int = 16

    @property
    def linears(self) -> list[str]:
        """The paths of the layers that are quantized, without embedding and head."""
        return [path for path in self.layers if part_of(path) != "embed"]

    def weights(self, path: str) -> int:
        """The number of weights of a layer."""
        return math.prod(self.shapes[path])

    def bits(self, path: str) -> float:
        """Bits that a quantized layer takes in all."""
        return self.layers[path].bits_per_weight(self.scale_bits) * self.weights(path)

    def config(self) -> QuantizationConfig:
        """The layers as config.json records them."""
        return QuantizationConfig.of(
            {path: LayerQuantization(**scheme.to_dict()) for path, scheme in self.layers.items()}
        )


def kept_lines(kept: Mapping[str, str]) -> list[str]:
    """The layers that stay in floating point, in words; `kept` gives the reason for each."""
    by_reason = {reason: [path for path, given in kept.items() if given == reason] for reason in kept.values()}
    return [f"in floating point ({reason}): {names(paths, most=3)}" for reason, paths in sorted(by_reason.items())]


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The weights of all layers that can be quantized, linears and the embedding, in the order of the module tree."""
    matrices = {
        name.removesuffix(".weight"): shape for name, shape in parameter_shapes(config).items() if len(shape) == 2
    }
    return dict(sorted(matrices.items(), key=lambda item: _natural(item[0])))


def is_sensitive(path: str, depth: Mapping[str, int]) -> bool:
    """Whether a layer's error matters most, by the rule of mlx-lm's mixed recipes, which is llama.cpp's.

    These are, in the first and the last eighth of the blocks and in every third block between, the layers that write
    the residual stream from the most inputs, and the values of attention; in the tower also the layers between stages.

    Args:
        path: Its path, with the blocks of the tower numbered through.
        depth: The number of blocks, by the prefix of `path`.
    """
    block = re.search(r"\.(?:layers|blocks)\.(\d+)\.", path)
    if block is None:
        return True
    number, count = int(block[1]), depth[path.partition(".")[0]]
    outer = number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2
    return outer and path.endswith(("v_proj", "down_proj", "fc2", "qkv"))


def _numbered(path: str, depths: tuple[int, ...]) -> str:
    """The path with the tower's blocks numbered through all stages."""
    block = re.match(r"vision_tower\.stages\.(\d+)\.blocks\.(\d+)\.(.*)", path)
    if block is None:
        return path
    return f"vision_tower.blocks.{sum(depths[: int(block[1])]) + int(block[2])}.{block[3]}"


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(name), "") if name.isdecimal() else (-1, name) for name in path.split(".")]


def _one_of(what: str, value: Any, possible: Any) -> None:
    """Raises if `value` is not possible."""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value not in possible:
        choices = f"one of {', '.join(map(str, possible))}" if len(possible) > 1 else str(*possible)
        raise ConversionError(f"{what} must be {choices}, not {shown(value)}")


def _plain(value: Any) -> Any:
    """Python's own whole number in the place of NumPy's; everything else as it is."""
    number = as_whole(value)
    return value if number is None else number
