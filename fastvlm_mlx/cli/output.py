"""Reports and uploads the checkpoint that `convert` or `quantize` has written."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.cli.terminal import note, show, show_json
from fastvlm_mlx.cli.usage import usage_errors
from fastvlm_mlx.errors import GateError
from fastvlm_mlx.formatting import as_text, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.convert.quantize.report import QuantizationReport

HEADER = ("part", "bits/weight", "before", "after", "weight error")


def show_output(folder: Path, report: "QuantizationReport | None", *, as_json: bool = False) -> None:
    """Prints the report, if there is one, and the size of the folder."""
    from fastvlm_mlx.convert.write.files import folder_bytes

    if report is not None:
        if as_json:
            show_json(report.to_dict())
        else:
            show(_as_text(report))
    note(f"wrote {folder}, {readable_bytes(folder_bytes(folder))}")


def _as_text(report: "QuantizationReport") -> str:
    return "\n".join([as_text([HEADER, *report.rows()]), "", *map(_wrapped, report.lines())])


def _wrapped(line: str) -> str:
    """A line of text as several of at most 80 columns, the later ones indented."""
    return textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


@contextmanager
def failed_report_shown() -> Iterator[None]:
    """Writes the report of a quantization that does not meet its gates to stderr; nothing else would show it."""
    try:
        yield
    except GateError as err:
        if err.report is not None:
            show(_as_text(err.report), err=True)
        raise


def check_request(gates: Sequence[str] | None, repository: str | None) -> None:
    """Refuses gates that cannot be read and a repository that cannot exist, before any work."""
    from fastvlm_mlx.convert.compare.gates import Gate

    with usage_errors("--gate"):
        for gate in gates or ():
            Gate.parse(gate)
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import check_repository, is_logged_in

        with usage_errors("--upload-repo"):
            check_repository(repository)
        if not is_logged_in():
            note("not logged in to the Hub, so the upload at the end will fail; log in with `hf auth login`")


def upload_output(folder: Path, repository: str | None) -> None:
    """Uploads the folder to the Hub, if a repository is given."""
    if repository is not None:
        from fastvlm_mlx.convert.write.upload import upload

        note(f"uploading to {repository}")
        note(f"uploaded: {upload(folder, repository)}")
