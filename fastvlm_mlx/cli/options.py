"""Options that several commands share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

CHECK_FAILED = 3
"""Exit code of a command that did its work and found that a check has failed; 1 is for errors."""
if TYPE_CHECKING:
    from fastvlm_mlx.convert.quantize.scheme import Quantization

METRICS = ("visual_cosine", "kl", "top1", "top5", "greedy", "weight_error", "size_ratio", "bits_per_weight")
"""What a gate can name; importing it from the converter would load MLX."""
DEFAULT_MODEL = "apple/FastVLM-0.5B"
DEFAULT_PROMPT = "Describe the image."
MODEL_HELP = "Folder, .zip, Hub id, or one of demo, 0.5b, 1.5b, 7b."

Model = Annotated[str, typer.Option("--model", "-m", envvar="FASTVLM_MODEL", help=MODEL_HELP)]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=MODEL_HELP)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]


class DType(str, Enum):
    """The floating-point types that weights are stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def parse_resolution(text: str) -> int | str:
    """`auto` or a multiple of 64."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0 or int(text) % 64:
        raise typer.BadParameter(f"{text!r} is neither a positive multiple of 64 nor 'auto'")
    return int(text)


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
    """The ways to choose levels."""

    rtn = "rtn"
    gptq = "gptq"


class Format(str, Enum):
    """Output formats."""

    fastvlm = "fastvlm"
    mlx_vlm = "mlx-vlm"


def _parse_bits(text: str) -> int:
    """A number of bits, 0 for `none`; `Quantization` checks which numbers are possible."""
    if text == "none":
        return 0
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number of bits nor 'none'")
    return int(text)


def _part_bits(part: str) -> Any:
    return typer.Option(parser=_parse_bits, metavar="BITS|none", help=f"Bits for {part}.")


QPreset = Annotated[
    Preset | None,
    typer.Option(
        "--q-preset",
        help="Bits for all parts at once; auto measures what each layer is worth, which takes minutes. [default: int8]",
    ),
]
QBits = Annotated[int | None, typer.Option("--q-bits", help="Instead of a preset: 8, 6, 5, 4, 3 or 2 for every part.")]
QGroupSize = Annotated[int | None, typer.Option("--q-group-size", help="Weights that share a scale: 32, 64 or 128.")]
QMode = Annotated[Mode, typer.Option("--q-mode", help="Integers with scale and bias, or a floating format.")]
QDecoder = Annotated[Any, _part_bits("the decoder's layers")]
QEmbed = Annotated[Any, _part_bits("embedding and head")]
QProjector = Annotated[Any, _part_bits("the projector")]
QVision = Annotated[Any, _part_bits("the linears of the vision tower")]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        help="Bits per weight that preset auto may use: over the layers that it quantizes, scales included.",
    ),
]
QMethod = Annotated[
    Method,
    typer.Option(
        "--q-method",
        help="rtn rounds each weight to the nearest; gptq compensates for rounding errors, which takes minutes.",
    ),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="An image, or a folder of them, to measure on; may be repeated."),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="CONDITION",
        help="Write nothing unless the report meets this, such as 'top1>=0.95'; may be repeated. It can name "
        f"{', '.join(METRICS)}.",
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="Write for this project, or for mlx-vlm and mlx-swift.")]
UploadRepo = Annotated[
    str | None, typer.Option("--upload-repo", metavar="OWNER/NAME", help="Push the result to the Hub.")
]


def refuse(options: Sequence[str], reason: str) -> None:
    """Refuses the first of some options that were given and would change nothing.

    Raises:
        BadParameter: If there is one.
    """
    if options:
        raise typer.BadParameter(f"would change nothing {reason}", param_hint=options[0])


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The options that describe a quantization; `parts` maps decoder, embed, projector and vision to bits or None."""

    preset: Preset | None
    bits: int | None
    group_size: int | None
    mode: Mode
    parts: Mapping[str, int | None] = field(default_factory=dict)
    target_bpw: float | None
    method: Method

    @property
    def given(self) -> list[str]:
        """The options that differ from their defaults."""
        values = {
            "--q-preset": self.preset,
            "--q-bits": self.bits,
            "--q-group-size": self.group_size,
            "--q-mode": None if self.mode is Mode.affine else self.mode,
            **{f"--q-{part}": bits for part, bits in self.parts.items()},
            "--target-bpw": self.target_bpw,
            "--q-method": None if self.method is Method.rtn else self.method,
        }
        return [option for option, value in values.items() if value is not None]

    @property
    def takes_minutes(self) -> str | None:
        """Why quantizing takes long, as a line for the user; None if it does not."""
        reasons = []
        if self.preset is Preset.auto or (self.preset is None and self.target_bpw is not None):
            reasons.append("auto measures every layer by itself")
        if self.method is Method.gptq:
            reasons.append("gptq calibrates layer after layer")
        return f"{' and '.join(reasons)}: this takes minutes at full size" if reasons else None

    def request(self, output: Format) -> "Quantization":
        """The quantization for an output format; without bits, preset or mode it is int8."""
        from fastvlm_mlx.convert.quantize.scheme import Quantization

        parts = {part: bits for part, bits in self.parts.items() if bits is not None}
        if output is Format.mlx_vlm:
            parts = {"projector": 0, "vision": 0, **parts}
        preset = self.preset
        if preset is None and self.target_bpw is not None:
            preset = Preset.auto
        elif preset is None and self.bits is None and self.mode is Mode.affine and len(parts) < len(self.parts):
            preset = Preset.int8
        return Quantization(
            preset=preset.value if preset else None,
            bits=self.bits,
            group_size=self.group_size,
            mode=self.mode.value,
            parts=parts,
            target_bpw=self.target_bpw,
            method=self.method.value,
        )
