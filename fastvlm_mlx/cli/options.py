"""Options that several commands share."""

from enum import Enum
from typing import Annotated

import typer

CHECK_FAILED = 3
"""Exit code of a command that did its work and found that a check has failed; 1 is for errors."""

MODEL_HELP = "Folder, .zip, Hub id, or one of demo, 0.5b, 1.5b, 7b."

Model = Annotated[str, typer.Option("--model", "-m", envvar="FASTVLM_MODEL", help=MODEL_HELP)]
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
