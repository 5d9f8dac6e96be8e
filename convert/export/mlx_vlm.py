"""Writes a converted checkpoint in mlx-vlm's format, for it and for mlx-swift-lm's FastVLM.

In that format the tower has a BatchNorm and layer scales again (that change nothing), 1x1 convolutions instead of
linears, upstream's order of channels, and activations of true magnitude: mlx-vlm's GELU knows nothing of the scaling
for float16, so it is taken out.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.arrays import DTYPES, Array, Shape, float32
from fastvlm_mlx.convert.conversion import check_converted
from fastvlm_mlx.convert.export.configs import PROJECTION_DIM, check_exportable, configs
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.fold.modules import parameter_shapes
from fastvlm_mlx.convert.fold.operations import BATCH_NORM_EPS, even_odd
from fastvlm_mlx.convert.parts import by_part
from fastvlm_mlx.convert.progress import Meter, Progress
from fastvlm_mlx.convert.quantize.report import QuantizationReport
from fastvlm_mlx.convert.source.layouts import LAYOUTS, describe
from fastvlm_mlx.convert.source.match import expand
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.convert.write.card import Reader, card
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.convert.write.files import (
    INDEX_FILE,
    REPORT_FILE,
    REPORTS,
    copy_small_files,
    folder_bytes,
    licences,
    write_json,
)
from fastvlm_mlx.convert.write.shards import Shard, ShardWriter, index, shards
from fastvlm_mlx.convert.write.units import Stored, single
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.schema import read_object
from fastvlm_mlx.streams import own_stream

MLX_VLM = Reader(
    tags=("mlx-vlm",),
    form=" for mlx-vlm and mlx-swift-lm: the vision tower's norms and layer scales are folded into its convolutions",
    usage="""\
```bash
pip install mlx-vlm
python -m mlx_vlm.generate --model PATH --image photo.jpg --prompt "Describe the image."
```

PATH is this folder or the id of its repository on the Hub.""",
)

HEAD = "vision_tower.vision_model.head.proj"

_REARRANGED = ("vision_tower.", "mm_projector.")
_DOUBLED = ("downsample.conv", "conv_exp.conv", "se.expand")
_ROWS = tuple(f"{name}.{leaf}" for name in _DOUBLED for leaf in ("weight", "bias"))
_COLUMNS = (".downsample.proj.weight", "se.reduce.weight", "mm_projector.0.weight")


@own_stream()
def export_mlx_vlm(
    source: str | Path, destination: str | Path, *, gates: Sequence[str] = (), progress: Progress | None = None
) -> QuantizationReport | None:
    """Writes the converted checkpoint `source` to the folder `destination` in mlx-vlm's layout.

    Towers of any size are written, though mlx-vlm loads none but the released one; see `check_readable`.

    Args:
        source: A folder in this project's format; its decoder and embedding may be quantized.
        destination: A folder that does not exist yet or is empty.
        gates: Conditions on the quantization report, such as `size_ratio<=0.4`.
        progress: Called with the bytes done, the bytes in all and a label of the current step.

    Returns:
        The quantization report of the source, if it has one, with the sizes of the export.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        ConversionError: If its tower or projector is quantized, or the destination exists.
        GateError: If a gate is not met; nothing is written then.
    """
    folder, target = Path(os.path.expanduser(source)), vacant(destination)
    config = ModelConfig.from_path(folder)
    check_converted(folder)
    with open_source(folder) as source_files:
        opened = source_files.in_parts(config.text_config)
        check_exportable([name.removesuffix(".scales") for name in opened.tensors if name.endswith(".scales")])
        with partial_folder(target, opened.nbytes) as out:
            meter = Meter(opened.nbytes, progress)
            files = shards(single(_stored(opened.tensors, config)))
            with ShardWriter(out, files) as writer:
                for key, values in _tensors(opened.tensors, config):
                    writer.write(key, [values], lambda count: meter.advance(count, "exporting"))
            write_json(out / INDEX_FILE, index(files))
            copy_small_files(folder, out)
            for name, contents in configs(config, Tokenizer(folder)).items():
                write_json(out / name, contents)
            report = _resized_report(folder, out, files, gates)
            if report is not None:
                report.check_gates()
                write_json(out / REPORT_FILE, report.to_dict())
            _write_card(out, target.name, config, "" if report is None else report.markdown())
    return report


def _resized_report(
    source: Path, export: Path, files: Sequence[Shard], gates: Sequence[str]
) -> QuantizationReport | None:
    """The quantization report of a source with the sizes of its export; None if it has none that can be shown."""
    sizes = by_part({name: stored.nbytes for file in files for name, stored in file.tensors.items()})
    try:
        report = QuantizationReport.from_dict(read_object(source / REPORT_FILE) or {})
        resized: QuantizationReport = replace(
            report,
            parts={part: each.resized(sizes[part]) for part, each in report.parts.items()},
            folder_bytes_after=folder_bytes(export, without=REPORTS),
            gates=tuple(gates),
        )
        resized.markdown(), resized.to_dict()
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # another version's, or damaged
    return resized


def _write_card(folder: Path, title: str, config: ModelConfig, report: str) -> None:
    """Writes the model card of an export."""
    parameters = by_part({name: math.prod(shape) for name, shape in parameter_shapes(config).items()})
    layout = describe(str(config.source.get("layout", "")))
    text = card(config, parameters, layout, title, licences(folder), report, reader=MLX_VLM)
    (folder / "README.md").write_text(text, encoding="utf-8")


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
