"""Options that several commands share."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.usage import CHECK_FAILED as CHECK_FAILED
from fastvlm_mlx.cli.usage import is_given, usage_errors
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.machine import cache_folder

if TYPE_CHECKING:
    from fastvlm_mlx.convert.quantize.scheme import Quantization

METRICS = ("visual_cosine", "kl", "top1", "top5", "greedy", "weight_error", "size_ratio", "bits_per_weight")
"""What a gate can name; importing it from the converter would load MLX."""
DEFAULT_MODEL = "apple/FastVLM-0.5B"
DEFAULT_PROMPT = "Describe the image."
MODEL_HELP = "Folder, .zip, Hub id, or one of demo, 0.5b, 1.5b, 7b."


def choices(kind: type[Enum]) -> str:
    """The values of an option as help shows them."""
    return "|".join(str(choice.value) for choice in kind)


def user_path(text: str) -> Path:
    """The path that an argument names: `~` leads to a home folder, unless something here has that name."""
    if not text:
        raise typer.BadParameter("the path is empty")
    if not text.startswith("~") or os.path.lexists(text):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as err:
        raise typer.BadParameter(f"{text!r}: there is no such home folder; give the whole path") from err


def complete_model(incomplete: str) -> list[str]:
    """What may follow `--model`: names, cached models, folders and archives that begin with what is typed."""
    from fastvlm_mlx.checkpoint.released import ALIASES, DEMO

    names = [DEMO, *ALIASES, *_cached_ids(), *_checkpoints_below(os.path.dirname(incomplete))]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _cached_ids() -> list[str]:
    """The Hub ids whose main branch is in the cache."""
    with suppress(OSError, FastVLMError):
        sources = [mark.read_text(encoding="utf-8") for mark in sorted(cache_folder().glob(".*--*@main-*.used"))]
        return [source.removesuffix("@main") for source in sources]
    return []


def _checkpoints_below(folder: str) -> Iterator[str]:
    """The folders and archives in a folder, as they would be typed."""
    with suppress(OSError):
        for entry in sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and (entry.is_dir() or entry.name.endswith(".zip")):
                yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")


def parse_resolution(text: str) -> int | str:
    """`auto` or a resolution that the tower can run at."""
    if text == "auto" or text.startswith("auto:"):
        from fastvlm_mlx.inputs.resolution import as_resolution

        with usage_errors():
            return as_resolution(text)
    if not text.isdecimal() or len(text) > 9 or int(text) == 0 or int(text) % 64:
        raise typer.BadParameter(f"{text!r} is neither a positive multiple of 64 nor 'auto'")
    from fastvlm_mlx.inputs.resolution import check_resolution

    with usage_errors():
        return check_resolution(int(text))


def with_detail(resolution: int | str | None, detail: float | None) -> int | str | None:
    """The resolution, with the details that `auto` keeps."""
    if detail is None:
        return resolution
    if resolution != "auto":
        raise typer.BadParameter("goes with --resolution auto", param_hint="--detail")
    return f"auto:{detail:g}"


def parse_background(text: str) -> str:
    """A colour's name or code."""
    from fastvlm_mlx.inputs.colours import parse_colour

    with usage_errors():
        parse_colour(text)
    return text


class DType(str, Enum):
    """The floating-point types that weights are stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="NAME", envvar="FASTVLM_MODEL", help=MODEL_HELP, autocompletion=complete_model
    ),
]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=MODEL_HELP, autocompletion=complete_model)]
Destination = typer.Argument(metavar="DESTINATION", parser=user_path, help="Folder to write; new or empty.")
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a Hub id.")]
Resolution = Annotated[
    Any,
    typer.Option(
        "--resolution",
        "-r",
        parser=parse_resolution,
        metavar="N|auto",
        envvar="FASTVLM_RESOLUTION",
        help="Pixels per side, a multiple of 64, or auto: as few as do not shrink it. [default: the model's own]",
    ),
]


def parse_seconds(text: str) -> float:
    """The seconds in a time such as `2`, `2s`, `500ms` or `1m`.

    Raises:
        typer.BadParameter: If it is none, or not above 0.
    """
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    unit = next((unit for unit in units if text.endswith(unit) and text[: -len(unit)].strip()[-1:].isdigit()), "")
    try:
        seconds = float(text.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= 1e6:
        raise typer.BadParameter(f"{printable(text, 40)!r} is not a time such as 2s, 500ms or 1m")
    return seconds


Frames = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=10_000,
        help="Frames of a film or animation, evenly spaced. [default: 4 of a film, the first of an animation]",
    ),
]
Detail = Annotated[
    float | None,
    typer.Option(
        "--detail",
        metavar="N",
        min=1,
        max=64,
        help="With --resolution auto, shrink pictures further, to N pixels for a detail and the gap beside it.",
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        metavar="COLOUR",
        parser=parse_background,
        help="Show this colour, such as white, through transparent pixels. [default: what is stored in them]",
    ),
]
Warm = Annotated[
    bool,
    typer.Option(
        "--warm/--no-warm",
        envvar="FASTVLM_WARM",
        help="Use `fastvlm serve --background` where it runs.",
    ),
]
LoadDType = Annotated[DType | None, typer.Option(metavar=choices(DType), help="Load the weights as this type.")]


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
        metavar=choices(Preset),
        help="Bits for all parts at once; auto measures what each layer is worth, which takes minutes. [default: int8]",
    ),
]
QBits = Annotated[
    int | None,
    typer.Option("--q-bits", metavar="N", help="Instead of a preset: 8, 6, 5, 4, 3 or 2 for every part."),
]
QGroupSize = Annotated[
    int | None, typer.Option("--q-group-size", metavar="N", help="Weights that share a scale: 32, 64 or 128.")
]
QMode = Annotated[
    Mode,
    typer.Option("--q-mode", metavar=choices(Mode), help="Integers with scale and bias, or a floating format."),
]
QDecoder = Annotated[Any, _part_bits("the decoder's layers")]
QEmbed = Annotated[Any, _part_bits("embedding and head")]
QProjector = Annotated[Any, _part_bits("the projector")]
QVision = Annotated[Any, _part_bits("the linears of the vision tower")]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        metavar="N",
        help="Bits per weight that preset auto may use: over the layers that it quantizes, scales included.",
    ),
]
QMethod = Annotated[
    Method,
    typer.Option(
        "--q-method",
        metavar=choices(Method),
        help="rtn rounds each weight to the nearest; gptq compensates for rounding errors, which takes minutes.",
    ),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", parser=user_path, help="An image, or a folder of them, to measure on; may be repeated."
    ),
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
OutputFormat = Annotated[
    Format,
    typer.Option("--format", metavar=choices(Format), help="Write for this project, or for mlx-vlm and mlx-swift."),
]
UploadRepo = Annotated[
    str | None, typer.Option("--upload-repo", metavar="OWNER/NAME", help="Push the result to the Hub.")
]


def is_for_subcommand(context: typer.Context) -> bool:
    """Whether a command of a group follows; options of the group itself would then change nothing.

    Raises:
        typer.BadParameter: If there are any.
    """
    if context.invoked_subcommand is None:
        return False
    given = [option.opts[0] for option in context.command.params if is_given(context, str(option.name))]
    refuse(given, f"before {context.invoked_subcommand}")
    return True


def refuse(options: Sequence[str] | Mapping[str, object], reason: str) -> None:
    """Refuses the first of some options that were given and would change nothing.

    Args:
        options: Those that were given, or the values of options by name: None, False and empty lists were not.
        reason: Such as `without --output`.

    Raises:
        BadParameter: If there is one.
    """
    if isinstance(options, Mapping):
        options = [name for name, value in options.items() if value is not None and value is not False and value != []]
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
