"""Reports and uploads the checkpoint that `convert` or `quantize` has written."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastvlm_mlx.cli.terminal import note
from fastvlm_mlx.formatting import as_text, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.convert.quantize.report import QuantizationReport

HEADER = ("part", "bits/weight", "before", "after", "weight error")


def show_output(folder: Path, report: "QuantizationReport | None", *, as_json: bool = False) -> None:
    """Prints the report, if there is one, and the size of the folder."""
    from fastvlm_mlx.convert.write.files import folder_bytes

    if report is not None:
        if as_json:
            typer.echo(json.dumps(report.to_dict()))
        else:
            typer.echo("\n".join([as_text([HEADER, *report.rows()]), "", *report.lines()]))
    note(f"wrote {folder}, {readable_bytes(folder_bytes(folder))}")


def check_upload(repository: str | None) -> None:
    """Rejects an invalid repository name early, before any work."""
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import check_repository

        check_repository(repository)


def upload_output(folder: Path, repository: str | None) -> None:
    """Uploads the folder to the Hub, if a repository is given."""
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import upload

        note(f"uploading to {repository}")
        note(f"uploaded: {upload(folder, repository)}")
