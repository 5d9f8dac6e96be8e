"""`fastvlm convert`: converts any published layout of FastVLM checkpoints to this project's folded MLX format."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.options import (
    Calibration,
    Destination,
    DType,
    Format,
    Gates,
    Method,
    Mode,
    OutputFormat,
    QBits,
    QDecoder,
    QEmbed,
    QGroupSize,
    QMethod,
    QMode,
    QPreset,
    QProjector,
    QuantizeOptions,
    QVision,
    Revision,
    Source,
    TargetBpw,
    UploadRepo,
    choices,
    refuse,
)
from fastvlm_mlx.cli.output import check_request, failed_report_shown, show_output, upload_output
from fastvlm_mlx.cli.terminal import ByteProgress, note, show
from fastvlm_mlx.cli.usage import usage_errors


def convert(
    source: Source,
    destination: Annotated[Path | None, Destination] = None,
    dtype: Annotated[DType, typer.Option(metavar=choices(DType), help="Floating-point type to store.")] = DType.float16,
    revision: Revision = None,
    vision_from: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Take the vision tower from here, for exports without one.")
    ] = None,
    calibration: Calibration = None,
    quantize: Annotated[
        bool,
        typer.Option("--quantize", "-q", help="Quantize, by default to int8; other --q options imply it."),
    ] = False,
    preset: QPreset = None,
    bits: QBits = None,
    group_size: QGroupSize = None,
    mode: QMode = Mode.affine,
    q_decoder: QDecoder = None,
    q_embed: QEmbed = None,
    q_projector: QProjector = None,
    q_vision: QVision = None,
    target_bpw: TargetBpw = None,
    method: QMethod = Method.rtn,
    gates: Gates = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Dequantize a quantized source instead of keeping it as it is.")
    ] = False,
    tie_word_embeddings: Annotated[
        bool | None,
        typer.Option(help="Use the embedding as the head, or the head, where config.json and weights contradict."),
    ] = None,
    output: OutputFormat = Format.fastvlm,
    upload_repo: UploadRepo = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read only headers and print the plan.")] = False,
) -> None:
    """Convert a checkpoint to MLX.

    Folds the vision tower and keeps its activations within float16, without torch. Nothing in the source is executed
    or modified, and a conversion that is interrupted leaves nothing behind. Exit code 3: a gate is not met.
    """
    options = QuantizeOptions(
        preset=preset,
        bits=bits,
        group_size=group_size,
        mode=mode,
        parts={"decoder": q_decoder, "embed": q_embed, "projector": q_projector, "vision": q_vision},
        target_bpw=target_bpw,
        method=method,
    )
    if not quantize and not options.given:
        refuse({"--gate": gates}, "without -q or another --q option: nothing is quantized")
    with usage_errors():
        quantization = options.request(output) if quantize or options.given else None
    check_request(gates, upload_repo)
    request: dict[str, Any] = {
        "quantization": quantization,
        "mlx_vlm": output is Format.mlx_vlm,
        "dtype": dtype.value,
        "revision": revision,
        "vision_from": vision_from,
        "dequantize": dequantize,
        "tie_word_embeddings": tie_word_embeddings,
        "calibration": calibration or (),
        "gates": gates or (),
    }
    if dry_run:
        from fastvlm_mlx.convert.request import planned_request  # without MLX

        show(str(planned_request(source, **request)))
        if upload_repo:
            show(f"{'then upload':<13} to {upload_repo}")
        return
    if destination is None:
        raise typer.BadParameter("missing; give a folder to write, or --dry-run", param_hint="DESTINATION")
    if options.takes_minutes:
        note(options.takes_minutes)
    from fastvlm_mlx.convert.pipeline import convert_and_quantize

    with failed_report_shown(), ByteProgress() as progress:
        report = convert_and_quantize(source, destination, **request, notify=note, progress=progress)
    show_output(destination, report)
    upload_output(destination, upload_repo)
