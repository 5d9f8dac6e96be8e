"""Writes a converted checkpoint as mlx-vlm does, for it and for mlx-swift-lm's FastVLM.

There the tower has a BatchNorm and layer scales again (that change nothing), 1x1 convolutions instead of linears,
upstream's order of channels, and true magnitudes: what keeps a tower within float16 here is taken out, since mlx-vlm's
GELU does not know of it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.convert.conversion import Meter, Progress
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.fold.operations import BATCH_NORM_EPS, Array, even_odd
from fastvlm_mlx.convert.quantize.checkpoint import copy_small_files, write_json
from fastvlm_mlx.convert.quantize.report import REPORT_FILE
from fastvlm_mlx.convert.source import layouts
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.convert.source.weights import float32
from fastvlm_mlx.convert.write import shards as writer
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.tokenizer import IM_END, Tokenizer

PROJECTION_DIM = 768
"""Of CLIP's head, which mlx-vlm has weights for and FastVLM does not use."""

_FLOATING = set(writer.DTYPES.values())
_DOUBLED = ("downsample.conv", "conv_exp.conv", "se.expand")
_ROWS = tuple(f"{name}.{leaf}" for name in _DOUBLED for leaf in ("weight", "bias"))
_COLUMNS = (".downsample.proj.weight", "se.reduce.weight", "mm_projector.0.weight")


def export_mlx_vlm(source: str | Path, destination: str | Path, *, progress: Progress | None = None) -> None:
    """Writes the converted checkpoint `source` to the folder `destination` in mlx-vlm's layout.

    Args:
        source: A folder in this project's format; its decoder and embedding may be quantized.
        destination: A folder that does not exist yet or is empty.
        progress: Called with bytes done, bytes in all and what is being done.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        ConversionError: If its tower or projector is quantized, or the destination exists.
    """
    folder, target = Path(source).expanduser(), vacant(destination)
    config = ModelConfig.from_path(folder)
    with open_source(folder) as opened:
        check_exportable([name.removesuffix(".scales") for name in opened.tensors if name.endswith(".scales")])
        with partial_folder(target, opened.nbytes) as out:
            meter = Meter(opened.nbytes, progress or (lambda *_: None))
            _write(opened.tensors, out, config, meter)
            copy_small_files(folder, out)
            for name, values in _configs(config, Tokenizer(folder)).items():
                write_json(out / name, values)
            for name in ("README.md", REPORT_FILE):
                if (folder / name).is_file():
                    (out / name).write_text((folder / name).read_text(encoding="utf-8"), encoding="utf-8")


def check_exportable(quantized: Iterable[str]) -> None:
    """Lets the paths of quantized layers pass that mlx-vlm's format can have.

    Raises:
        ConversionError: If there are others.
    """
    if other := [path for path in quantized if not path.startswith("language_model.")]:
        raise ConversionError(
            f"{other[0]} would be quantized; mlx-vlm's readers need tower and projector in floating point: quantize "
            "with vision none and projector none"
        )


def _write(tensors: Mapping[str, Tensor], folder: Path, config: ModelConfig, meter: Meter) -> None:
    unscale = factors(Scaling.of(config.vision_config.scales))
    keys = _keys(config)
    dtype = writer.DTYPES[config.dtype]
    made: dict[str, Tensor | Array] = {}
    for name, tensor in tensors.items():
        if not name.startswith(("vision_tower.", "mm_projector.")):
            made[name] = tensor
            continue
        values = _upstream(name, float32(tensor.read(), tensor.dtype) / np.float32(unscale.get(name, 1.0)))
        place = name.replace("conv_ffn.conv.weight", "conv_ffn.conv.conv.weight")
        made[keys[place]] = values
    made |= {keys[place]: values for place, values in _identities(config).items()}
    head = (config.vision_config.hidden_size, PROJECTION_DIM)
    made["vision_tower.vision_model.head.proj"] = np.zeros(head, np.float32)
    planned = {
        key: writer.Stored(value.dtype if isinstance(value, Tensor) else dtype, tuple(value.shape))
        for key, value in made.items()
    }
    files = writer.shards(planned)
    with writer.ShardWriter(folder, files) as out:
        for key, value in made.items():
            if isinstance(value, Tensor):
                out.copy(key, [value.read()], lambda count: meter.advance(count, "exporting"))
            else:
                out.write(key, [value], lambda count: meter.advance(count, "exporting"))
    write_json(folder / "model.safetensors.index.json", writer.index(files))


def _keys(config: ModelConfig) -> dict[str, str]:
    """mlx-vlm's key of every place of tower and projector, by the rules that read its layout."""
    layout = next(layout for layout in layouts.LAYOUTS if layout.name == "mlx-vlm")
    return {
        place: key
        for rule in layout.rules
        if rule.place is not None and not rule.place.startswith("language_model.")
        for pairs in layouts.expand(rule, max(config.vision_config.depths))
        for key, place in pairs
    }


def _upstream(name: str, values: Array) -> Array:
    """A parameter of tower or projector in upstream's order and shape."""
    if name.endswith(_ROWS):
        values = values[np.argsort(even_odd(len(values)))]
    if name.endswith(_COLUMNS):
        values = values[:, np.argsort(even_odd(values.shape[1]))]
    attention = name.endswith(("token_mixer.qkv.weight", "token_mixer.proj.weight"))
    if values.ndim == 2 and name.startswith("vision_tower.") and not attention:
        values = values[:, None, None, :]
    return values


def _identities(config: ModelConfig) -> dict[str, Array]:
    """The BatchNorms and layer scales that are folded here, as ones that change nothing, by place."""
    vision = config.vision_config
    values: dict[str, Array] = {}
    for stage, (depth, channels) in enumerate(zip(vision.depths, vision.embed_dims, strict=True)):
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        for number in range(depth):
            block = f"vision_tower.stages.{stage}.blocks.{number}"
            norm = f"{block}.conv_ffn.conv.bn"
            values |= {f"{norm}.weight": ones, f"{norm}.bias": zeros, f"{norm}.running_mean": zeros}
            values[f"{norm}.running_var"] = ones - np.float32(BATCH_NORM_EPS)
            values[f"{block}.conv_ffn.layer_scale"] = ones[None, None]
            if stage > 2:
                values[f"{block}.token_mixer.layer_scale"] = ones[None, None]
    return values


def _configs(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The configs that differ from ours, by file."""
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
