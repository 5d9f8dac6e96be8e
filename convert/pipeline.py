"""From any checkpoint to what was asked for in the end: converted, quantized, in this project's format or mlx-vlm's."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastvlm_mlx.checkpoint.folder import is_converted
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.compare.agreement import picture_files
from fastvlm_mlx.convert.conversion import Progress, convert_checkpoint, plan
from fastvlm_mlx.convert.export.mlx_vlm import check_exportable, export_mlx_vlm
from fastvlm_mlx.convert.quantize.checkpoint import quantize_checkpoint
from fastvlm_mlx.convert.quantize.report import Gate, LossReport
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.convert.write.destination import vacant
from fastvlm_mlx.errors import ConversionError


def produce(
    source: str | Path,
    destination: str | Path,
    *,
    wanted: Quantization | None = None,
    mlx_vlm: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    calibration: Iterable[str | Path] = (),
    gates: Sequence[str] = (),
    progress: Progress | None = None,
) -> LossReport | None:
    """Writes a checkpoint to the folder `destination`; whatever is impossible is an error before any work starts.

    Args:
        source: As for `convert_checkpoint`.
        destination: A folder that does not exist yet or is empty.
        wanted: How to quantize, if at all.
        mlx_vlm: Whether to write mlx-vlm's format.
        dtype: As for `convert_checkpoint`; by default that of a converted source, else float16.
        revision: As for `convert_checkpoint`.
        vision_from: As for `convert_checkpoint`.
        dequantize: Whether to dequantize a quantized source.
        calibration: Pictures, or folders of them, to measure on beside the built-in ones.
        gates: Conditions on what quantization costs, such as `top1>=0.95`.
        progress: Called with bytes done, bytes in all and what is being done.

    Returns:
        What quantization cost, if it was quantized.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConversionError: If something cannot be done as asked, or a gate is not met.
        ImageError: If a calibration picture cannot be read.
    """
    target, pictures = vacant(destination), picture_files(map(Path, calibration))
    for gate in gates:
        Gate.parse(gate)
    if gates and wanted is None:
        raise ConversionError("a gate is a condition on what quantization costs, and nothing is to be quantized")
    folder = parse_name(source).path
    ready = ModelConfig.from_path(folder) if folder and is_converted(folder) else None
    dtype = dtype or (ready.dtype if ready else "float16")
    options = {"dtype": dtype, "revision": revision, "vision_from": vision_from, "dequantize": dequantize}
    planned = plan(source, **options)
    if dequantize and not planned.dequantized:
        raise ConversionError(f"{source}: is not quantized; there is nothing to dequantize")
    if wanted is not None:
        if planned.kept_quantized or planned.dequantized:
            raise ConversionError(
                f"{source}: is quantized already; quantize what it was made from, or dequantize it first"
            )
        layers = wanted.assign(planned.config).layers
        if mlx_vlm:
            check_exportable(layers)

    above = next(parent for parent in target.absolute().parents if parent.is_dir())
    with scratch_folder(above, f"{target.name}.steps") as scratch:
        if ready is None or dtype != ready.dtype or dequantize or (wanted is None and not mlx_vlm):
            last = wanted is None and not mlx_vlm
            folder = target if last else scratch / "converted"
            convert_checkpoint(source, folder, **options, calibration_images=pictures, progress=progress)
        report = None
        if wanted is not None:
            quantized = scratch / target.name if mlx_vlm else target
            report = quantize_checkpoint(
                folder, quantized, wanted, calibration=pictures, gates=gates, progress=progress
            )
            folder = quantized
        if mlx_vlm:
            export_mlx_vlm(folder, target, progress=progress)
    return report
