"""`fastvlm convert`: any published layout of FastVLM checkpoints into this project's folded MLX format."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, DType, Revision
from fastvlm_mlx.cli.terminal import ByteProgress, human_bytes, note


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
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="IMAGE", help="A picture to measure the float16 range on, beside the built-in ones; repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read only headers and print the plan.")] = False,
) -> None:
    """Convert a checkpoint to MLX.

    Folds the vision tower and keeps its activations within float16, without torch. Nothing in the source is executed
    or modified, and a conversion that is interrupted leaves nothing behind.
    """
    from fastvlm_mlx.convert import convert_checkpoint, plan

    if dry_run:
        typer.echo(plan(source, dtype=dtype.value, revision=revision, vision_from=vision_from))
        return
    if destination is None:
        raise typer.BadParameter("missing; give a folder to write, or --dry-run", param_hint="DESTINATION")
    with ByteProgress() as progress:
        convert_checkpoint(
            source,
            destination,
            dtype=dtype.value,
            revision=revision,
            vision_from=vision_from,
            calibration_images=calibration or (),
            progress=progress,
        )
    size = sum(file.stat().st_size for file in destination.iterdir())
    note(f"wrote {destination}, {human_bytes(size)}")
