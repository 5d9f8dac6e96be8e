"""`fastvlm quantize`: a checkpoint with fewer bits per weight, and what that cost."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, Revision
from fastvlm_mlx.cli.terminal import ByteProgress, note
from fastvlm_mlx.formatting import as_text, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.convert.quantize.report import LossReport
    from fastvlm_mlx.convert.quantize.scheme import Quantization

HEADER = ("part", "bits/weight", "before", "after", "weight error")


class Preset(str, Enum):
    """Bits for every part of the model at once."""

    int8 = "int8"
    int4 = "int4"
    mixed_4_6 = "mixed_4_6"
    mixed_4_8 = "mixed_4_8"
    auto = "auto"


class Mode(str, Enum):
    """MLX's ways to quantize."""

    affine = "affine"
    mxfp4 = "mxfp4"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


class Method(str, Enum):
    """How levels are chosen."""

    rtn = "rtn"
    gptq = "gptq"


class Format(str, Enum):
    """Whose checkpoints are written."""

    fastvlm = "fastvlm"
    mlx_vlm = "mlx-vlm"


def _bits(text: str) -> int:
    """`none` or a number of bits; which numbers there are, `Quantization` says."""
    if text == "none":
        return 0
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number of bits nor 'none'")
    return int(text)


def _part(what: str) -> Any:
    return typer.Option(parser=_bits, metavar="BITS|none", help=f"Bits for {what}.")


PresetOption = Annotated[
    Preset | None,
    typer.Option(
        "--q-preset", help="Bits for all parts at once; auto measures what each layer is worth. [default: int8]"
    ),
]
Bits = Annotated[int | None, typer.Option("--q-bits", help="Instead of a preset: 8, 6, 5, 4, 3 or 2 for every part.")]
GroupSize = Annotated[int | None, typer.Option("--q-group-size", help="Weights that share a scale: 32, 64 or 128.")]
ModeOption = Annotated[Mode, typer.Option("--q-mode", help="Integers with scale and bias, or a floating format.")]
DecoderBits = Annotated[Any, _part("the decoder's layers")]
EmbedBits = Annotated[Any, _part("embedding and head")]
ProjectorBits = Annotated[Any, _part("the projector")]
VisionBits = Annotated[Any, _part("the linears of the vision tower")]
Target = Annotated[float | None, typer.Option("--target-bpw", help="Bits per weight that preset auto may use.")]
MethodOption = Annotated[
    Method,
    typer.Option("--q-method", help="Round each weight to the nearest, or let others make up for it (takes minutes)."),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="A picture, or a folder of them, to measure on; may be repeated."),
]
Gate = Annotated[
    list[str] | None,
    typer.Option(metavar="CONDITION", help="Write nothing unless the report meets this, such as 'top1>=0.95'."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="Write for this project, or for mlx-vlm and mlx-swift.")]
Upload = Annotated[str | None, typer.Option("--upload-repo", metavar="OWNER/NAME", help="Push the result to the Hub.")]


def request(
    preset: Preset | None,
    bits: int | None,
    group_size: int | None,
    mode: Mode,
    parts: dict[str, int | None],
    target: float | None,
    method: Method,
    form: Format,
) -> "Quantization":
    """What the options ask for; without bits, preset or mode it is int8."""
    from fastvlm_mlx.convert.quantize.scheme import Quantization

    if preset is None and bits is None and mode is Mode.affine and target is None:
        preset = Preset.int8
    if form is Format.mlx_vlm:
        parts = {"projector": 0, "vision": 0, **{part: own for part, own in parts.items() if own is not None}}
    return Quantization(
        preset=preset.value if preset else "auto" if target is not None else None,
        bits=bits,
        group_size=group_size,
        mode=mode.value,
        parts={part: own for part, own in parts.items() if own is not None},
        target_bpw=target,
        method=method.value,
    )


def quantize(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=MODEL_HELP)],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="Folder to write; must not exist.")],
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
    calibration: Calibration = None,
    gate: Gate = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="The other way round: to floating point.")
    ] = False,
    form: FormatOption = Format.fastvlm,
    upload_repo: Upload = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Quantize a checkpoint, and say what was lost.

    The report compares weights, visual tokens and next-token distributions with the source's. It is printed, written
    beside the weights and put on the model card.
    """
    from fastvlm_mlx.convert.compare.agreement import picture_files
    from fastvlm_mlx.convert.pipeline import produce
    from fastvlm_mlx.convert.write.destination import vacant
    from fastvlm_mlx.resolve import resolve

    vacant(destination)
    pictures = picture_files(calibration or ())
    parts = {"decoder": q_decoder, "embed": q_embed, "projector": q_projector, "vision": q_vision}
    wanted = None if dequantize else request(preset, bits, group_size, mode, parts, target_bpw, method, form)
    check(upload_repo)
    with ByteProgress() as progress:
        folder = resolve(source, revision=revision, notify=note, progress=progress)
        report = produce(
            folder,
            destination,
            wanted=wanted,
            mlx_vlm=form is Format.mlx_vlm,
            dequantize=dequantize,
            calibration=pictures,
            gates=gate or (),
            progress=progress,
        )
    show(report, destination, as_json=as_json)
    push(destination, upload_repo)


def show(report: "LossReport | None", destination: Path, *, as_json: bool) -> None:
    """Prints a report, and what was written."""
    if report is not None:
        if as_json:
            typer.echo(json.dumps(report.to_dict()))
        else:
            typer.echo("\n".join([as_text([HEADER, *report.rows()]), "", *report.lines()]))
    size = sum(file.stat().st_size for file in destination.iterdir())
    note(f"wrote {destination}, {readable_bytes(size)}")


def check(repository: str | None) -> None:
    """Notices before any work what cannot be the name of a repository."""
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import check_repository

        check_repository(repository)


def push(folder: Path, repository: str | None) -> None:
    """Uploads a folder to the Hub, if it is to be."""
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import upload

        note(f"uploading to {repository}")
        note(f"uploaded: {upload(folder, repository)}")
