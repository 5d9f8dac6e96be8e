"""Reads an upstream config.json and checks every key that would change the arithmetic."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastvlm_mlx.config import ActivationScales, TextConfig, VisionConfig
from fastvlm_mlx.convert.arrays import Shape
from fastvlm_mlx.errors import CheckpointError, ConfigError

_DEFAULT_IMAGE_SIZE = 1024
_DEFAULT_MAX_LENGTH = 8192
_STAGE_WIDTH = "vision_tower.stages.{}.blocks.0.conv_ffn.fc2.bias"

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("pad",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("full",),
    "vision_feature_layer": (-1,),
    "model_type": ("llava_qwen2", "fast_vlm", "fastvlm", "qwen2"),
}
"""The values of the architecture that is built here; a missing key or null means the same."""


def check(config: Mapping[str, Any]) -> None:
    """Checks that a config.json describes the architecture built here.

    Raises:
        ConfigError: If a setting says otherwise.
    """
    for key, accepted in _REQUIRED.items():
        value = config.get(key)
        if value is not None and value not in accepted:
            raise ConfigError(f"config.json: {key} is {value!r}; only {' or '.join(map(repr, accepted))} is supported")
    text = decoder_values(config)
    if any(kind != "full_attention" for kind in text.get("layer_types") or ()):
        raise ConfigError("config.json: layer_types has other layers than 'full_attention', which are not supported")
    vision = vision_values(config)
    architecture = vision.get("architecture")
    if architecture is not None and architecture != "fastvit_mci3":
        raise ConfigError(f"config.json: the vision architecture is {architecture!r}; only 'fastvit_mci3' is supported")
    tower = config.get("mm_vision_tower")
    if tower is not None and not re.fullmatch(r"mobileclip_l_\d+", str(tower)):
        raise ConfigError(f"config.json: mm_vision_tower is {tower!r}; expected mobileclip_l_<resolution>")


def decoder_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's keys: nested as in transformers, or flat as in LLaVA."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and nested else config


def vision_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's keys; LLaVA's config has none."""
    nested = config.get("vision_config")
    return nested if isinstance(nested, Mapping) else {}


def text_config(config: Mapping[str, Any], shape: Callable[[str], Shape], layers: int) -> TextConfig:
    """The decoder's architecture, its sizes from the tensors; the caller decides whether the head is tied.

    Args:
        config: The source's config.json.
        shape: Returns the shape of the tensor for a target.
        layers: The number of layers among the tensors.

    Raises:
        CheckpointError: If the config belongs to a model of another size.
        ConfigError: If a key is missing or its value is not supported.
    """
    values = dict(decoder_values(config))
    layer = "language_model.model.layers.0"
    sizes = {
        "hidden_size": shape("language_model.model.norm.weight")[0],
        "intermediate_size": shape(f"{layer}.mlp.gate_proj.weight")[0],
        "num_hidden_layers": layers,
        "vocab_size": shape("language_model.model.embed_tokens.weight")[0],
    }
    for key, value in sizes.items():
        # transformers pads the vocabulary: more rows than tokens are fine
        if (said := values.get(key, value)) != value and not (key == "vocab_size" and said < value):
            raise CheckpointError(
                f"config.json says {key} {said}, the tensors have {value}; it belongs to another model"
            )
    for key in ("num_attention_heads", "num_key_value_heads"):
        if not isinstance(values.get(key), int):
            raise ConfigError(f"config.json: {key} is missing, and tensors cannot tell it")
    text = TextConfig.from_dict({**values, **sizes, "model_type": "qwen2"})
    cached = shape(f"{layer}.self_attn.k_proj.bias")[0]
    if cached != text.num_key_value_heads * text.head_dim:
        raise CheckpointError(
            f"config.json says {text.num_key_value_heads} key/value heads of {text.head_dim} channels, but k_proj has "
            f"{cached} outputs; it belongs to another model"
        )
    return text


def vision_config(config: Mapping[str, Any], shape: Callable[[str], Shape], depths: tuple[int, ...]) -> VisionConfig:
    """The tower's architecture, its sizes from the tensors and its resolution from the config.

    Args:
        config: The config.json of the source of the tower.
        shape: Returns the shape of the tensor for a target.
        depths: The number of blocks of each stage among the tensors.

    Raises:
        ConfigError: If the widths are not those of a FastViTHD.
    """
    widths = tuple(shape(_STAGE_WIDTH.format(stage))[0] for stage in range(5))
    hidden = shape("vision_tower.stages.0.blocks.0.conv_ffn.fc1.bias")[0]
    return VisionConfig(
        embed_dims=widths,
        depths=depths,
        mlp_ratio=hidden // max(widths[0], 1),
        image_size=_image_size(config),
        scales=ActivationScales.ones(depths),
    )


def _image_size(config: Mapping[str, Any]) -> int:
    if named := re.fullmatch(r"mobileclip_l_(\d+)", str(config.get("mm_vision_tower"))):
        return int(named[1])
    size = vision_values(config).get("image_size", _DEFAULT_IMAGE_SIZE)
    if not isinstance(size, int):
        raise ConfigError(f"config.json: vision_config.image_size must be a number of pixels, not {size!r}")
    return size


def max_length(config: Mapping[str, Any]) -> int:
    """The longest sequence, in positions, that the model was tuned for: our key, or LLaVA's.

    Raises:
        ConfigError: If it is not a number.
    """
    length = config.get("max_length") or config.get("tokenizer_model_max_length") or _DEFAULT_MAX_LENGTH
    if not isinstance(length, int):
        raise ConfigError(f"config.json: tokenizer_model_max_length must be a whole number, not {length!r}")
    return length
