"""Reads an upstream config.json and checks every key that would change the arithmetic."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastvlm_mlx.config import ActivationScales, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.schema import array, boolean, integer, mapping, shown

_DEFAULT_IMAGE_SIZE = 1024
_DEFAULT_MAX_LENGTH = 8192
_NAMED_TOWER = re.compile(r"mobileclip_l_([0-9]{1,5})")
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
            supported = " or ".join(map(repr, accepted))
            raise ConfigError(f"config.json: {key} is {shown(value)}; only {supported} is supported")
    text = decoder_values(config)
    kinds = array(text.get("layer_types") or [], "config.json: layer_types")
    if any(kind != "full_attention" for kind in kinds):
        raise ConfigError("config.json: layer_types has other layers than 'full_attention', which are not supported")
    vision = vision_values(config)
    architecture = vision.get("architecture")
    if architecture is not None and architecture != "fastvit_mci3":
        named = shown(architecture)
        raise ConfigError(f"config.json: the vision architecture is {named}; only 'fastvit_mci3' is supported")
    tower = config.get("mm_vision_tower")
    if tower is not None and not _NAMED_TOWER.fullmatch(str(tower)):
        raise ConfigError(f"config.json: mm_vision_tower is {shown(tower)}; expected mobileclip_l_<resolution>")


def decoder_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's keys: nested as in transformers, or flat as in LLaVA."""
    return mapping(config.get("text_config") or config, "config.json: text_config")


def vision_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's keys; LLaVA's config has none."""
    return mapping(config.get("vision_config") or {}, "config.json: vision_config")


def tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a config says that the head is the embedding; None if it does not say.

    Raises:
        ConfigError: If it says neither true nor false.
    """
    value = decoder_values(config).get("tie_word_embeddings")
    return None if value is None else boolean(value, "config.json: tie_word_embeddings")


def text_config(config: Mapping[str, Any], size: Callable[[str], int], layers: int) -> TextConfig:
    """The decoder's architecture, its sizes from the tensors; the caller decides whether the head is tied.

    Args:
        config: The source's config.json.
        size: Returns the rows of the tensor for a target.
        layers: The number of layers among the tensors.

    Raises:
        CheckpointError: If the config belongs to a model of another size.
        ConfigError: If a key is missing or its value is not supported.
    """
    values = dict(decoder_values(config))
    layer = "language_model.model.layers.0"
    sizes = {
        "hidden_size": size("language_model.model.norm.weight"),
        "intermediate_size": size(f"{layer}.mlp.gate_proj.weight"),
        "num_hidden_layers": layers,
        "vocab_size": size("language_model.model.embed_tokens.weight"),
    }
    for key, value in sizes.items():
        # transformers pads the vocabulary: more rows than tokens are fine
        said = integer(value if values.get(key) is None else values[key], f"config.json: {key}")
        if said != value and not (key == "vocab_size" and said < value):
            raise CheckpointError(
                f"config.json says {key} {said}, the tensors have {value}; it belongs to another model"
            )
    for key in ("num_attention_heads", "num_key_value_heads"):
        if values.get(key) is None:
            raise ConfigError(f"config.json: {key} is missing, and tensors cannot tell it")
    text = TextConfig.from_dict({**values, **sizes, "tie_word_embeddings": True, "model_type": "qwen2"})
    cached = size(f"{layer}.self_attn.k_proj.bias")
    if cached != text.num_key_value_heads * text.head_dim:
        raise CheckpointError(
            f"config.json says {text.num_key_value_heads} key/value heads of {text.head_dim} channels, but k_proj has "
            f"{cached} outputs; it belongs to another model"
        )
    return text


def vision_config(config: Mapping[str, Any], size: Callable[[str], int], depths: tuple[int, ...]) -> VisionConfig:
    """The tower's architecture, its sizes from the tensors and its resolution from the config.

    Args:
        config: The config.json of the source of the tower.
        size: Returns the rows of the tensor for a target.
        depths: The number of blocks of each stage among the tensors.

    Raises:
        ConfigError: If the widths are not those of a FastViTHD.
    """
    widths = tuple(size(_STAGE_WIDTH.format(stage)) for stage in range(5))
    hidden = size("vision_tower.stages.0.blocks.0.conv_ffn.fc1.bias")
    return VisionConfig(
        embed_dims=widths,
        depths=depths,
        mlp_ratio=hidden // max(widths[0], 1),
        image_size=_image_size(config),
        scales=ActivationScales.ones(depths),
    )


def _image_size(config: Mapping[str, Any]) -> int:
    if named := _NAMED_TOWER.fullmatch(str(config.get("mm_vision_tower"))):
        return int(named[1])
    size = vision_values(config).get("image_size", _DEFAULT_IMAGE_SIZE)
    if not isinstance(size, int):
        raise ConfigError(f"config.json: vision_config.image_size must be a number of pixels, not {shown(size)}")
    return size


def max_length(config: Mapping[str, Any]) -> int:
    """The longest sequence, in positions, that the model was tuned for: our key, or LLaVA's.

    Raises:
        ConfigError: If it is not a number.
    """
    length = config.get("max_length") or config.get("tokenizer_model_max_length") or _DEFAULT_MAX_LENGTH
    if not isinstance(length, int):
        raise ConfigError(f"config.json: tokenizer_model_max_length must be a whole number, not {shown(length)}")
    return length
