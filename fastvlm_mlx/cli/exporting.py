"""Options for what is made of captions, which `fastvlm caption` and `fastvlm merge` share."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.captioning import NAMED
from fastvlm_mlx.cli.options import choices, refuse, user_path
from fastvlm_mlx.cli.terminal import note

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.exports import Exporter, Exports


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


def chosen_exports(
    *,
    txt: bool,
    xmp: bool,
    xmp_name: XMPName | None,
    embed: bool,
    csv: Path | None,
    hf: bool,
    webdataset: Path | None,
    overwrite: bool,
) -> "Exports":
    """The outputs that the options choose.

    Raises:
        typer.BadParameter: If one of them would change nothing.
    """
    from fastvlm_mlx.jobs.exports import Exports

    if not xmp:
        refuse({"--xmp-name": xmp_name}, "without --xmp")
    if not (txt or xmp or embed):
        refuse({"--overwrite": overwrite}, "without --txt, --xmp or --embed")
    return Exports(
        txt=txt,
        xmp=xmp,
        xmp_name=None if xmp_name is None else xmp_name.value,
        embed=embed,
        csv=csv,
        hf=hf,
        webdataset=webdataset,
        overwrite=overwrite,
    )


def note_exports(exporter: "Exporter") -> None:
    """Says what was not written, and why."""
    for reason, count in exporter.left_out.items():
        note(f"{count} text{'s' * (count > 1)} not written: {reason}")
    for failure in exporter.failures[:NAMED]:
        note(f"not written: {failure}")
    if len(exporter.failures) > NAMED:
        note(f"not written: {len(exporter.failures) - NAMED} more for such reasons")
