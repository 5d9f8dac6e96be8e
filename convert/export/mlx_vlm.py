"""Writes a converted checkpoint in mlx-vlm's format, for it and for mlx-swift-lm's FastVLM.

In that format the tower has a BatchNorm and layer scales again (that change nothing), 1x1 convolutions instead of
linears, upstream's order of channels, and activations of true magnitude: mlx-vlm's GELU knows nothing of the scaling
for float16, so it is taken out.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.convert.arrays import DTYPES, Array, Shape, float32
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.fold.operations import BATCH_NORM_EPS, even_odd
from fastvlm_mlx.convert.progress import Meter, Progress
from fastvlm_mlx.convert.source.layouts import LAYOUTS
from fastvlm_mlx.convert.source.match import expand
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.convert.write.files import INDEX_FILE, REPORT_FILE, copy_small_files, write_json
from fastvlm_mlx.convert.write.shards import ShardWriter, Stored, index, shards
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.tokenizer import IM_END, Tokenizer

PROJECTION_DIM = 768
"""The width of CLIP's head, which mlx-vlm has weights for and FastVLM does not use."""

HEAD = "vision_tower.vision_model.head.proj"

_REARRANGED = ("vision_tower.", "mm_projector.")
_DOUBLED = ("downsample.conv", "conv_exp.conv", "se.expand")
_ROWS = tuple(f"{name}.{leaf}" for name in _DOUBLED for leaf in ("weight", "bias"))
_COLUMNS = (".downsample.proj.weight", "se.reduce.weight", "mm_projector.0.weight")


def export_mlx_vlm(source: str | Path, destination: str | Path, *, progress: Progress | None = None) -> None:
    """Writes the converted checkpoint `source` to the folder `destination` in mlx-vlm's layout.

    Args:
        source: A folder in this project's format; its decoder and embedding may be quantized.
        destination: A folder that does not exist yet or is empty.
        progress: Called with the bytes done, the bytes in all and a label of the current step.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        ConversionError: If its tower or projector is quantized, or the destination exists.
    """
    folder, target = Path(source).expanduser(), vacant(destination)
    config = ModelConfig.from_path(folder)
    with open_source(folder) as opened:
        check_exportable([name.removesuffix(".scales") for name in opened.tensors if name.endswith(".scales")])
        with partial_folder(target, opened.nbytes) as out:
            meter = Meter(opened.nbytes, progress)
            files = shards(_stored(opened.tensors, config))
            with ShardWriter(out, files) as writer:
                for key, values in _tensors(opened.tensors, config):
                    writer.write(key, [values], lambda count: meter.advance(count, "exporting"))
            write_json(out / INDEX_FILE, index(files))
            copy_small_files(folder, out)
            for name, contents in _configs(config, Tokenizer(folder)).items():
                write_json(out / name, contents)
            for name in ("README.md", REPORT_FILE):
                if (folder / name).is_file():
                    (out / name).write_text((folder / name).read_text(encoding="utf-8"), encoding="utf-8")


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


def _stored(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Stored]:
    """The dtype and shape of every tensor of the export, in the order of `_tensors`."""
    keys, dtype = _keys(config), DTYPES[config.dtype]
    stored: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.startswith(_REARRANGED):
            stored[keys[_target(name)]] = Stored(dtype, _upstream_shape(name, tensor.shape))
        else:
            stored[name] = Stored(tensor.dtype, tensor.shape)
    for target, values in _identities(config).items():
        stored[keys[target]] = Stored(dtype, values.shape)
    stored[HEAD] = Stored(dtype, (config.vision_config.hidden_size, PROJECTION_DIM))
    return stored


def _tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every tensor of the export, read one at a time."""
    keys = _keys(config)
    scale = factors(Scaling.of(config.vision_config.scales))
    for name, tensor in tensors.items():
        if name.startswith(_REARRANGED):
            values = float32(tensor.read(), tensor.dtype) / np.float32(scale.get(name, 1.0))
            yield keys[_target(name)], _upstream(name, values)
        else:
            yield name, tensor.read()
    for target, values in _identities(config).items():
        yield keys[target], values
    yield HEAD, np.zeros((config.vision_config.hidden_size, PROJECTION_DIM), np.float32)


def _target(name: str) -> str:
    """The target that the rules of mlx-vlm's layout have for one of our parameters."""
    return name.replace("conv_ffn.conv.weight", "conv_ffn.conv.conv.weight")


def _keys(config: ModelConfig) -> dict[str, str]:
    """mlx-vlm's key of every target in tower and projector, by the rules that read its layout."""
    layout = next(layout for layout in LAYOUTS if layout.name == "mlx-vlm")
    return {
        target: key
        for rule in layout.rules
        if rule.target is not None and not rule.target.startswith("language_model.")
        for pairs in expand(rule, max(config.vision_config.depths))
        for key, target in pairs
    }


def _upstream(name: str, values: Array) -> Array:
    """A parameter of tower or projector in upstream's order and shape."""
    if name.endswith(_ROWS):
        values = values[np.argsort(even_odd(len(values)))]
    if name.endswith(_COLUMNS):
        values = values[:, np.argsort(even_odd(values.shape[1]))]
    return values.reshape(_upstream_shape(name, values.shape))


def _upstream_shape(name: str, shape: Shape) -> Shape:
    """The shape of a parameter of tower or projector upstream, where linears outside attention are 1x1 convolutions."""
    attention = name.endswith(("token_mixer.qkv.weight", "token_mixer.proj.weight"))
    if len(shape) == 2 and name.startswith("vision_tower.") and not attention:
        return (shape[0], 1, 1, shape[1])
    return shape


def _identities(config: ModelConfig) -> dict[str, Array]:
    """BatchNorms and layer scales that change nothing, in the place of the folded ones, by target."""
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
