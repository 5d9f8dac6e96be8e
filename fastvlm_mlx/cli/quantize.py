"""`fastvlm quantize`: writes a checkpoint with fewer bits per weight and reports what that cost."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import (
    Calibration,
    Destination,
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
    refuse,
)
from fastvlm_mlx.cli.output import check_request, failed_report_shown, show_output, upload_output
from fastvlm_mlx.cli.terminal import ByteProgress, note
from fastvlm_mlx.cli.usage import usage_errors


def quantize(
    source: Source,
    destination: Annotated[Path, Destination],
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
    calibration: Calibration = None,
    gates: Gates = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Dequantize to floating point instead.")
    ] = False,
    output: OutputFormat = Format.fastvlm,
    upload_repo: UploadRepo = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Quantize a checkpoint and report what that cost.

    The report compares weights, visual tokens and next-token distributions with the source's. It is printed, written
    beside the weights and put on the model card. Exit code 3: a gate is not met.
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
    if dequantize:
        refuse(options.given, "with --dequantize")
        refuse({"--gate": gates, "--json": as_json}, "with --dequantize")
    from fastvlm_mlx.convert.compare.probes import image_files
    from fastvlm_mlx.convert.pipeline import convert_and_quantize
    from fastvlm_mlx.convert.request import planned_request
    from fastvlm_mlx.convert.write.destination import vacant
    from fastvlm_mlx.resolve import find, resolve

    with usage_errors():
        quantization = None if dequantize else options.request(output)
    check_request(gates, upload_repo)
    vacant(destination)
    images = image_files(calibration or ())
    if options.takes_minutes:
        note(options.takes_minutes)
    if find(source, revision=revision) is None:  # a request that is impossible costs no download
        planned_request(
            source,
            quantization=quantization,
            mlx_vlm=output is Format.mlx_vlm,
            revision=revision,
            dequantize=dequantize,
            calibration=images,
            gates=gates or (),
        )
    with failed_report_shown(), ByteProgress() as progress:
        folder = resolve(source, revision=revision, notify=note, progress=progress)
        report = convert_and_quantize(
            folder,
            destination,
            quantization=quantization,
            mlx_vlm=output is Format.mlx_vlm,
            dequantize=dequantize,
            calibration=images,
            gates=gates or (),
            progress=progress,
        )
    show_output(destination, report, as_json=as_json)
    upload_output(destination, upload_repo)
