"""Options for what is made of captions, which `fastvlm caption` and `fastvlm merge` share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import choices, user_path


class XMPName(str, Enum):
    """How XMP sidecars are called."""

    ext = "ext"
    plain = "plain"


Txt = Annotated[bool, typer.Option("--txt", help="Write photo.txt beside each picture.")]
Xmp = Annotated[bool, typer.Option("--xmp", help="Write an XMP sidecar beside each picture.")]
XmpName = Annotated[
    XMPName | None,
    typer.Option(metavar=choices(XMPName), help="photo.jpg.xmp or photo.xmp. [default: the one that is there, or ext]"),
]
Embed = Annotated[
    bool,
    typer.Option("--embed", help="Write it into the JPEG, PNG and WebP files themselves, as XMP; keeps their dates."),
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", parser=user_path, help="Write a table.")]
Hf = Annotated[bool, typer.Option("--hf", help="Write metadata.jsonl, for Hugging Face's imagefolder.")]
WebDataset = Annotated[
    Path | None,
    typer.Option(metavar="PREFIX", parser=user_path, help="Write PREFIX-000000.tar and so on, with the pictures."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace descriptions that people have written, too.")]
