"""Runs the steps from any checkpoint to the requested one: convert, quantize, export."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from fastvlm_mlx.checkpoint.folder import is_converted
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.compare.probes import image_files
from fastvlm_mlx.convert.conversion import convert_checkpoint
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.plan import Plan
from fastvlm_mlx.convert.progress import Notify, Progress
from fastvlm_mlx.convert.quantize.checkpoint import quantize_checkpoint
from fastvlm_mlx.convert.quantize.report import QuantizationReport
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.request import planned_request
from fastvlm_mlx.convert.write.destination import check_alone, folder_for_steps, vacant
from fastvlm_mlx.errors import ConversionError

Step = Callable[..., Plan | QuantizationReport | None]
"""Called with a source, a destination and `progress=`."""


def convert_and_quantize(
    source: str | Path,
    destination: str | Path,
    *,
    quantization: Quantization | None = None,
    mlx_vlm: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    tie_word_embeddings: bool | None = None,
    calibration: Iterable[str | Path] = (),
    gates: Sequence[str] = (),
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> QuantizationReport | None:
    """Writes a checkpoint to the folder `destination`; every check comes before any work.

    Args:
        source: As for `convert_checkpoint`.
        destination: A folder that does not exist yet or is empty.
        quantization: How to quantize; None to leave it out.
        mlx_vlm: Whether to write mlx-vlm's format.
        dtype: As for `convert_checkpoint`; by default that of a converted source, else float16.
        revision: As for `convert_checkpoint`.
        vision_from: As for `convert_checkpoint`.
        dequantize: Whether to dequantize a quantized source.
        tie_word_embeddings: As for `convert_checkpoint`.
        calibration: Images, or folders of them, to measure on in addition to the built-in ones.
        gates: Conditions on the quantization report, such as `top1>=0.95`, about the checkpoint as it is written.
        notify: Called with a line before a download.
        progress: Called with the bytes done, the bytes in all and a label of the current step.

    Returns:
        The report, if the checkpoint was quantized.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConversionError: If the request is impossible.
        GateError: If a gate is not met; nothing is written then.
        ImageError: If a calibration image cannot be read.
    """
    target = vacant(destination)
    check_alone(target)
    steps = planned_steps(
        source,
        quantization=quantization,
        mlx_vlm=mlx_vlm,
        dtype=dtype,
        revision=revision,
        vision_from=vision_from,
        dequantize=dequantize,
        tie_word_embeddings=tie_word_embeddings,
        images=image_files(calibration),
        gates=gates,
        notify=notify,
    )
    report = None
    current: str | Path = source
    with folder_for_steps(target) as scratch:
        for number, step in enumerate(steps, 1):
            following = target if number == len(steps) else scratch / str(number) / target.name
            result = step(current, following, progress=progress)
            report = result if isinstance(result, QuantizationReport) else report
            current = following
    return report


def planned_steps(
    source: str | Path,
    *,
    quantization: Quantization | None,
    mlx_vlm: bool,
    dtype: str | None,
    revision: str | None,
    vision_from: str | Path | None,
    dequantize: bool,
    tie_word_embeddings: bool | None,
    images: Sequence[Path],
    gates: Sequence[str],
    notify: Notify | None = None,
) -> list[Step]:
    """The steps of `convert_and_quantize`, at least one; each reads the folder that the one before it wrote.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConversionError: If the request is impossible.
    """
    folder = parse_name(source).path
    converted = ModelConfig.from_path(folder) if folder and is_converted(folder) else None
    if dtype is None:
        dtype = converted.dtype if converted else "float16"
    options = {
        "dtype": dtype,
        "revision": revision,
        "vision_from": vision_from,
        "dequantize": dequantize,
        "tie_word_embeddings": tie_word_embeddings,
    }
    planned_request(source, **options, quantization=quantization, mlx_vlm=mlx_vlm, calibration=images, gates=gates)

    steps: list[Step] = []
    if quantization is not None:
        checked = () if mlx_vlm else gates  # an export is larger, so its gates are checked in its place
        steps.append(partial(quantize_checkpoint, quantization=quantization, calibration=images, gates=checked))
    if mlx_vlm:
        steps.append(partial(export_mlx_vlm, gates=gates))
    if converted is None or dtype != converted.dtype or dequantize or tie_word_embeddings is not None or not steps:
        steps.insert(0, partial(convert_checkpoint, **options, calibration_images=images, notify=notify))
    elif images and quantization is None:
        raise ConversionError("calibration images would change nothing: nothing is to be converted or quantized")
    return steps
