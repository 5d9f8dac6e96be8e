"""The config files of mlx-vlm's format, and what that format can hold."""

from collections.abc import Iterable
from typing import Any

from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig, VisionConfig
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.inputs.tokenizer_files import IM_END

PROJECTION_DIM = 768
"""The width of CLIP's head, which mlx-vlm has weights for and FastVLM does not use."""


def check_exportable(quantized: Iterable[str]) -> None:
    """Checks that mlx-vlm's format can have quantized layers at these paths.

    Raises:
        ConversionError: If it cannot.
    """
    if other := [path for path in quantized if not path.startswith("language_model.")]:
        raise ConversionError(
            f"{other[0]} would be quantized; mlx-vlm's readers need tower and projector in floating point: quantize "
            "with vision none and projector none"
        )


def check_readable(vision: VisionConfig) -> None:
    """Checks that mlx-vlm can load a tower: its sizes are constants there, which no config.json changes.

    Raises:
        ConversionError: If it cannot.
    """
    if (vision.depths, vision.embed_dims) != (VisionConfig.depths, VisionConfig.embed_dims):
        raise ConversionError(
            f"mlx-vlm loads only the released vision tower, of depths {list(VisionConfig.depths)} and widths "
            f"{list(VisionConfig.embed_dims)}; this one has depths {list(vision.depths)} and widths "
            f"{list(vision.embed_dims)}, so leave --format mlx-vlm out"
        )


def configs(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The config files that differ from ours, by name."""
    vision, text = config.vision_config, config.text_config
    side = vision.image_size
    entry = config.quantization.to_dict() if config.quantization else None
    quantization = {"quantization": entry, "quantization_config": entry}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "image_mean": [0, 0, 0],
        "image_std": [1, 1, 1],
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "config.json": {
            "model_type": "llava_qwen2",
            "architectures": ["LlavaQwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "vocab_size": text.vocab_size,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "max_position_embeddings": text.max_position_embeddings,
            "tie_word_embeddings": text.tie_word_embeddings,
            "use_sliding_window": False,
            "eos_token_id": tokenizer.token_id(IM_END),
            "image_token_index": IMAGE_TOKEN,
            "image_aspect_ratio": "pad",
            "mm_hidden_size": vision.hidden_size,
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": f"mobileclip_l_{side}",
            "tokenizer_model_max_length": config.max_length,
            "tokenizer_padding_side": "right",
            "torch_dtype": config.dtype,
            "vision_config": {
                "model_type": "llava_qwen2",
                "architecture": "fastvit_mci3",
                "image_size": side,
                "patch_size": vision.patch_size,
                "hidden_size": 1024,
                "intermediate_size": vision.hidden_size,
                "projection_dim": PROJECTION_DIM,
                "num_classes": 1000,
                "cls_ratio": 2.0,
                "down_patch_size": 7,
                "down_stride": 2,
                "downsamples": [True] * 5,
                "embed_dims": list(vision.embed_dims),
                "layers": list(vision.depths),
                "layer_scale_init_value": 1e-5,
                "mlp_ratios": [vision.mlp_ratio] * 5,
                "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
                "repmixer_kernel_size": 3,
                "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
            },
            **(quantization if entry else {}),
        },
        "preprocessor_config.json": {**image_processor, "processor_class": "FastVLMProcessor"},
        "processor_config.json": {
            "image_processor": {**image_processor, "image_processor_type": "FastVLMImageProcessor"},
            "processor_class": "FastVLMProcessor",
        },
    }
