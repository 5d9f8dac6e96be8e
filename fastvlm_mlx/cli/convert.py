"""`fastvlm convert`: any published layout of FastVLM checkpoints into this project's folded MLX format."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, DType, Revision
from fastvlm_mlx.cli.quantize import (
    Bits,
    Calibration,
    DecoderBits,
    EmbedBits,
    Format,
    FormatOption,
    Gate,
    GroupSize,
    Method,
    MethodOption,
    Mode,
    ModeOption,
    PresetOption,
    ProjectorBits,
    Target,
    Upload,
    VisionBits,
    check,
    push,
    request,
    show,
)
from fastvlm_mlx.cli.terminal import ByteProgress


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=MODEL_HELP)],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DESTINATION", help="Folder to write; must not exist. Not needed with --dry-run."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Floating-point type to store.")] = DType.float16,
    revision: Revision = None,
    vision_from: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Take the vision tower from here, for exports without one.")
    ] = None,
    calibration: Calibration = None,
    quantized: Annotated[
        bool,
        typer.Option("--quantize", "-q", help="Quantize, by default to int8; other --q options imply it."),
    ] = False,
    preset: PresetOption = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: ModeOption = Mode.affine,
    q_decoder: DecoderBits = None,
    q_embed: EmbedBits = None,
    q_projector: ProjectorBits = None,
    q_vision: VisionBits = None,
    target_bpw: Target = None,
    method: MethodOption = Method.rtn,
    gate: Gate = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Dequantize a quantized source instead of keeping it as it is.")
    ] = False,
    form: FormatOption = Format.fastvlm,
    upload_repo: Upload = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read only headers and print the plan.")] = False,
) -> None:
    """Convert a checkpoint to MLX.

    Folds the vision tower and keeps its activations within float16, without torch. Nothing in the source is executed
    or modified, and a conversion that is interrupted leaves nothing behind.
    """
    from fastvlm_mlx.convert import plan
    from fastvlm_mlx.convert.pipeline import produce

    if dry_run:
        typer.echo(plan(source, dtype=dtype.value, revision=revision, vision_from=vision_from, dequantize=dequantize))
        return
    if destination is None:
        raise typer.BadParameter("missing; give a folder to write, or --dry-run", param_hint="DESTINATION")
    parts = {"decoder": q_decoder, "embed": q_embed, "projector": q_projector, "vision": q_vision}
    asked = (preset, bits, group_size, target_bpw, gate, *parts.values())
    wanted = None
    if quantized or mode is not Mode.affine or method is not Method.rtn or any(option is not None for option in asked):
        wanted = request(preset, bits, group_size, mode, parts, target_bpw, method, form)
    check(upload_repo)
    with ByteProgress() as progress:
        report = produce(
            source,
            destination,
            wanted=wanted,
            mlx_vlm=form is Format.mlx_vlm,
            dtype=dtype.value,
            revision=revision,
            vision_from=vision_from,
            dequantize=dequantize,
            calibration=calibration or (),
            gates=gate or (),
            progress=progress,
        )
    show(report, destination, as_json=False)
    push(destination, upload_repo)
