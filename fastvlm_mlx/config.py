"""The architecture of a checkpoint: frozen dataclasses, read from and written to `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastvlm_mlx.arguments import file_path
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.projections import part_paths
from fastvlm_mlx.schema import array, boolean, integer, mapping, number, read_object, shown

FORMAT_VERSION = 2
"""Of the checkpoints that are written: in version 1, each projection of the decoder is a tensor of its own."""
READABLE_FORMATS = (1, 2)
_UPGRADE = "pip install -U fastvlm-mlx"
_FORMAT_ENTRY = f"{FORMAT_VERSION}; {_UPGRADE}"
"""What config.json says of the version: a reader of version 1 shows it in its error."""
IMAGE_TOKEN = -200
"""The id that stands for an image in `input_ids`; LLaVA's, outside every vocabulary."""

QUANTIZATION_MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""The bits and the group sizes that MLX supports in each mode, the usual group size first."""

_MOST_LAYERS = 1000
"""Of the decoder or of a stage: a model is built before its tensors are read."""
_MOST_CHANNELS = 2**24
"""Of any layer: MLX's sizes have 32 bits, and some are products."""
_LARGEST_IMAGE = 2**14
"""The largest `image_size`: it makes 65,536 visual tokens."""
_EPSILONS = (1e-12, 0.1)
"""The range of the epsilons of norms; most are 1e-5 or 1e-6."""
_THETAS = (1.0, 1e12)
"""The range of `rope_theta`; Qwen2's is 1e6."""
_LARGEST_SCALE = 2.0**64
"""The largest activation scale: an epsilon divided by its square is still a number."""

_T = TypeVar("_T")


def format_number(entry: Any) -> int | None:
    """The version that a `fastvlm_format` names, as a number or as a text that begins with one; None if it has none."""
    if isinstance(entry, str):
        number = entry.partition(";")[0]
        return int(number) if number.isdecimal() and len(number) < 10 else None
    return entry if type(entry) is int else None


def _known(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """An instance of the dataclass `cls` from the keys of `values` that it has; the others are ignored."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    try:
        return cls(**{key: value for key, value in values.items() if key in names})
    except TypeError as err:
        raise ConfigError(f"{cls.__name__}: {str(err).split(' ', 1)[-1]}") from err


def _check_sizes(owner: object, *names: str, most: int = _MOST_CHANNELS) -> None:
    for name in names:
        integer(getattr(owner, name), f"{type(owner).__name__}.{name}", most=most)


def _scale(value: Any) -> float:
    """`value`, if it is a power of two in the range of activation scales."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 1 / _LARGEST_SCALE <= value <= _LARGEST_SCALE and math.frexp(value)[0] == 0.5):
        raise ConfigError(f"scales must be powers of two, not {shown(value)}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class StageScales:
    """The powers of two that divide the activations of one stage (all 1 in an ordinary checkpoint).

    Attributes:
        stream: The residual stream, from the stage's first tensor to its last.
        downsample: The outputs of the two GELUs of the stage's PatchEmbed; the second equals `stream`. Empty in stage
            0.
        hidden: The GELU of each block's ConvFFN.
    """

    stream: float = 1.0
    downsample: tuple[float, ...] = ()
    hidden: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ActivationScales:
    """The powers of two that keep a tower's activations within float16 without changing its result.

    The converter folds them into the weights. The runtime needs them only for GELU and LayerNorm, which are not
    homogeneous.

    Attributes:
        stem: The outputs of the three GELUs of the stem; the last equals stage 0's stream.
        stages: One entry per stage.
        conv_exp: The expanding convolution, its GELU and so the tower's output.
    """

    stem: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stages: tuple[StageScales, ...]
    conv_exp: float = 1.0

    def __post_init__(self) -> None:
        """Rejects what is not a power of two or contradicts itself."""
        for value in (*self.stem, self.conv_exp):
            _scale(value)
        for index, stage in enumerate(self.stages):
            for value in (stage.stream, *stage.downsample, *stage.hidden):
                _scale(value)
            before = self.stem[2] if index == 0 else stage.downsample[1] if len(stage.downsample) == 2 else None
            if before != stage.stream:
                raise ConfigError(
                    f"scales: stage {index}'s stream is divided by {stage.stream} but starts with {before}"
                )

    @classmethod
    def ones(cls, depths: tuple[int, ...]) -> "ActivationScales":
        """Scales that change nothing, for a tower with `depths` blocks per stage."""
        return cls(
            stages=tuple(
                StageScales(downsample=(1.0, 1.0) if stage else (), hidden=(1.0,) * depth)
                for stage, depth in enumerate(depths)
            )
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ActivationScales":
        """The inverse of `dataclasses.asdict`, from JSON.

        Raises:
            ConfigError: If a value is missing, of the wrong kind or no power of two.
        """

        def scales(owner: Mapping[str, Any], key: str) -> tuple[float, ...]:
            return tuple(_scale(value) for value in array(owner[key], f"scales.{key}"))

        stages = []
        for entry in array(values["stages"], "scales.stages"):
            stage = mapping(entry, "scales.stages")
            stages.append(
                StageScales(
                    stream=_scale(stage["stream"]),
                    downsample=scales(stage, "downsample"),
                    hidden=scales(stage, "hidden"),
                )
            )
        stem = scales(values, "stem")
        if len(stem) != 3 or len(stages) != 5:
            raise ConfigError(f"scales must have 3 values for the stem and 5 stages, not {len(stem)} and {len(stages)}")
        return cls(stem=(stem[0], stem[1], stem[2]), stages=tuple(stages), conv_exp=_scale(values["conv_exp"]))


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """FastViTHD (arXiv 2412.13303, section 3.2) in its folded inference form.

    Attributes:
        embed_dims: Channels of the five stages; the tower's output has twice the last.
        depths: Blocks of the five stages.
        mlp_ratio: Expansion of every ConvFFN.
        head_dim: Channels of one attention head in stages 3 and 4.
        image_size: The resolution in pixels that the weights are tuned at.
        layer_norm_eps: Epsilon of the channel LayerNorms, before scaling.
        scales: What keeps float16 in range.
    """

    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    mlp_ratio: int = 4
    head_dim: int = 32
    image_size: int = 1024
    layer_norm_eps: float = 1e-5
    scales: ActivationScales

    def __post_init__(self) -> None:
        """Rejects an architecture that is not FastViTHD's."""
        _check_sizes(self, "mlp_ratio", most=1024)
        if self.head_dim != 32:
            raise ConfigError(f"VisionConfig.head_dim must be 32, not {shown(self.head_dim)}")
        _check_sizes(self, "image_size", most=_LARGEST_IMAGE)
        number(self.layer_norm_eps, "VisionConfig.layer_norm_eps", *_EPSILONS)
        if len(self.embed_dims) != 5 or len(self.depths) != 5:
            dims, depths = shown(list(self.embed_dims)), shown(list(self.depths))
            raise ConfigError(f"FastViTHD has 5 stages; embed_dims {dims} and depths {depths} do not")
        for dim, depth in zip(self.embed_dims, self.depths, strict=True):
            integer(dim, "VisionConfig.embed_dims", most=2**16)
            integer(depth, "VisionConfig.depths", most=_MOST_LAYERS)
        if any(after != 2 * before for before, after in zip(self.embed_dims, self.embed_dims[1:], strict=False)):
            raise ConfigError(f"each stage is twice as wide as the one before; embed_dims {self.embed_dims} are not")
        if any(dim % self.head_dim for dim in self.embed_dims[3:]):
            raise ConfigError(f"embed_dims {self.embed_dims[3:]} are not divisible by head_dim {self.head_dim}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of {self.patch_size}")
        if tuple(len(stage.hidden) for stage in self.scales.stages) != self.depths:
            raise ConfigError("scales do not have one entry per block")

    @property
    def patch_size(self) -> int:
        """Pixels per visual token and side."""
        return 64

    @property
    def hidden_size(self) -> int:
        """Channels of the tower's output."""
        return 2 * self.embed_dims[-1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """The configuration in a `vision_config` of ours."""
        depths = tuple(
            integer(depth, "VisionConfig.depths", most=_MOST_LAYERS)
            for depth in array(values.get("depths", cls.depths), "VisionConfig.depths")
        )
        if "scales" in values:
            scales = ActivationScales.from_dict(mapping(values["scales"], "scales"))
        else:
            scales = ActivationScales.ones(depths)
        embed_dims = tuple(array(values.get("embed_dims", cls.embed_dims), "VisionConfig.embed_dims"))
        return _known(cls, {**values, "embed_dims": embed_dims, "depths": depths, "scales": scales})


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Qwen2, with the keys of its Hugging Face config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    model_type: str = "qwen2"

    def __post_init__(self) -> None:
        """Rejects values out of range, and sizes that contradict each other."""
        _check_sizes(
            self, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
        )
        _check_sizes(self, "num_hidden_layers", most=_MOST_LAYERS)
        integer(self.max_position_embeddings, "TextConfig.max_position_embeddings")
        number(self.rms_norm_eps, "TextConfig.rms_norm_eps", *_EPSILONS)
        number(self.rope_theta, "TextConfig.rope_theta", *_THETAS)
        boolean(self.tie_word_embeddings, "TextConfig.tie_word_embeddings")
        if self.model_type != "qwen2":
            raise ConfigError(f"the decoder must be qwen2, not {shown(self.model_type)}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def part_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each part of the fused projections; see `projections.PARTS`."""
        cached = self.num_key_value_heads * self.head_dim
        return {
            "qkv_proj": (self.num_attention_heads * self.head_dim, cached, cached),
            "gate_up_proj": (self.intermediate_size, self.intermediate_size),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextConfig":
        """The configuration in a Hugging Face Qwen2 config; keys that change the arithmetic are checked."""
        if values.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act must be 'silu', not {shown(values['hidden_act'])}")
        if values.get("use_sliding_window"):
            raise ConfigError("use_sliding_window is on; only full attention is supported")
        rope = mapping(values.get("rope_parameters") or values.get("rope_scaling") or {}, "rope_parameters")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"rotary embeddings of type {shown(kind)} are not supported")
        theta = values.get("rope_theta", rope.get("rope_theta", cls.rope_theta))
        theta = number(theta, "TextConfig.rope_theta", *_THETAS)
        return _known(cls, {**values, "rope_theta": theta, "model_type": values.get("model_type", "qwen2")})


@dataclass(frozen=True, kw_only=True)
class LayerQuantization:
    """How one layer is quantized.

    Attributes:
        group_size: Weights that share a scale; None for the mode's own.
        bits: Per weight; None for the mode's own.
        mode: MLX's name: `affine`, `mxfp4`, `mxfp8`, `nvfp4`.
    """

    group_size: int | None = None
    bits: int | None = None
    mode: str = "affine"

    def __post_init__(self) -> None:
        """Rejects what MLX does not support."""
        _check_sizes(self, *(name for name in ("group_size", "bits") if getattr(self, name) is not None))
        if not isinstance(self.mode, str):
            raise ConfigError(f"LayerQuantization.mode must be a text, not {shown(self.mode)}")
        if self.mode not in QUANTIZATION_MODES:
            known = ", ".join(QUANTIZATION_MODES)
            raise ConfigError(f"LayerQuantization.mode must be one of {known}, not {shown(self.mode)}")
        for what, value, possible in zip(
            ("bits", "group_size"), (self.bits, self.group_size), QUANTIZATION_MODES[self.mode], strict=True
        ):
            if value not in (None, *possible):
                numbers = ", ".join(map(str, sorted(possible)))
                raise ConfigError(f"LayerQuantization.{what} in mode {self.mode} must be one of {numbers}, not {value}")

    def to_dict(self) -> dict[str, Any]:
        """The known settings, as keyword arguments of MLX's quantization functions."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.to_dict().items())


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the layers of a checkpoint are quantized, as mlx-lm records it in `config.json`.

    It does not say which layers are quantized: those are, that are stored with `scales`.

    Attributes:
        default: Of every layer that is not in `overrides`.
        overrides: By module path.
    """

    default: LayerQuantization
    overrides: Mapping[str, LayerQuantization] = field(default_factory=dict)

    def for_layer(self, path: str) -> LayerQuantization:
        """How the layer at `path`, such as `mm_projector.2`, is quantized.

        Raises:
            ConfigError: If it is a fused one, and its parts are quantized differently.
        """
        first, *others = (self.overrides.get(part, self.default) for part in part_paths(path))
        if any(other != first for other in others):
            raise ConfigError(f"quantization gives the parts of {path} different settings, but they are one matrix")
        return first

    @classmethod
    def of(cls, layers: Mapping[str, LayerQuantization]) -> "QuantizationConfig":
        """The shortest record of these layers, at least one: the most common settings are the default."""
        settings = list(layers.values())
        default = max(settings, key=settings.count)
        return cls(default=default, overrides={path: layer for path, layer in layers.items() if layer != default})

    @classmethod
    def from_dict(cls, values: Any) -> "QuantizationConfig":
        """Reads the entry of a `config.json`: `group_size`, `bits`, `mode`, and by path what differs.

        Raises:
            ConfigError: If it is no JSON object or holds values of the wrong kind.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"quantization must be an object with group_size, bits and mode, not {shown(values)}")
        default = _known(LayerQuantization, values)
        overrides = {
            path: _known(LayerQuantization, {**asdict(default), **layer})
            for path, layer in values.items()
            if isinstance(layer, Mapping)
        }
        return cls(default=default, overrides=overrides)

    def to_dict(self) -> dict[str, Any]:
        """The entry of a `config.json`."""
        return {**self.default.to_dict(), **{path: layer.to_dict() for path, layer in self.overrides.items()}}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole FastVLM checkpoint in this project's format.

    Attributes:
        vision_config: The vision tower.
        text_config: The decoder.
        dtype: `float16`, `bfloat16` or `float32`, as stored.
        eos_token_id: Every token that ends an answer.
        max_length: The longest sequence in positions that the model was tuned for.
        quantization: How layers are quantized; None when none is.
        source: Where it came from: `name`, `revision`, `sha256`, `layout`.
    """

    vision_config: VisionConfig
    text_config: TextConfig
    dtype: str = "float16"
    eos_token_id: tuple[int, ...] = ()
    max_length: int = 8192
    quantization: QuantizationConfig | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Rejects values that are of the wrong kind or out of range."""
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"dtype must be float16, bfloat16 or float32, not {shown(self.dtype)}")
        for token in self.eos_token_id:
            integer(token, "ModelConfig.eos_token_id", least=0, most=self.text_config.vocab_size - 1)
        integer(self.max_length, "ModelConfig.max_length")
        for key, value in mapping(self.source, "ModelConfig.source").items():
            if value is not None and not (isinstance(value, str) and value == printable(value, 1000)):
                raise ConfigError(f"ModelConfig.source must hold short texts, not {shown(value)} as {shown(key)}")

    @property
    def context_length(self) -> int:
        """The most positions of a prompt and its answer together."""
        return min(self.max_length, self.text_config.max_position_embeddings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The configuration in a parsed `config.json` of ours.

        Raises:
            ConfigError: If it is of another format or version, or contradicts itself.
        """
        version = values.get("fastvlm_format")
        if version is None:
            raise ConfigError("not a converted FastVLM checkpoint: config.json has no fastvlm_format")
        if format_number(version) not in READABLE_FORMATS:
            readable = " and ".join(map(str, READABLE_FORMATS))
            raise ConfigError(
                f"fastvlm_format {shown(version)} was written by another version of fastvlm-mlx; this one reads "
                f"{readable}: {_UPGRADE}, or convert the checkpoint again"
            )
        entry = values.get("quantization") or None
        try:
            parts = {
                "vision_config": VisionConfig.from_dict(mapping(values["vision_config"], "vision_config")),
                "text_config": TextConfig.from_dict(mapping(values["text_config"], "text_config")),
                "eos_token_id": tuple(array(values["eos_token_id"], "eos_token_id")),
                "quantization": QuantizationConfig.from_dict(entry) if entry is not None else None,
            }
        except KeyError as err:
            raise ConfigError(f"config.json lacks {err}") from err
        return _known(cls, {**values, **parts})

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, with the keys that other tools look for."""
        values = {
            "model_type": "fastvlm",
            "architectures": ["FastVLM"],
            "fastvlm_format": _FORMAT_ENTRY,
            "image_token_index": IMAGE_TOKEN,
            "mm_projector_type": "mlp2x_gelu",
            **asdict(self),
        }
        values["vision_config"] = {
            "model_type": "fastvithd",
            "patch_size": self.vision_config.patch_size,
            **values["vision_config"],
        }
        del values["quantization"]
        if self.quantization is not None:
            entry = self.quantization.to_dict()
            values |= {"quantization": entry, "quantization_config": entry}
        return values

    @classmethod
    def from_path(cls, folder: Path) -> "ModelConfig":
        """The configuration of a converted folder.

        Raises:
            CheckpointError: If `config.json` is missing or not JSON.
            ConfigError: If it is not one of ours.
        """
        path = file_path(folder, "folder") / "config.json"
        values = read_object(path)
        if values is None:
            raise CheckpointError(f"{printable(path)}: not found; {printable(folder)} is not a checkpoint folder")
        try:
            return cls.from_dict(values)
        except ConfigError as err:
            raise ConfigError(f"{printable(path)}: {err}") from err
