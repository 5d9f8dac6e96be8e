"""`fastvlm bench compare`: tells whether a later report is slower than an earlier one."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import CHECK_FAILED, user_path
from fastvlm_mlx.cli.terminal import note, show
from fastvlm_mlx.formatting import as_text


def _percentage(text: str) -> float:
    """Parses `5%` or `0.05` as a fraction."""
    try:
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as err:
        raise typer.BadParameter(f"{text!r} is not a percentage such as 5%") from err
    if not 0 <= fraction < 10:
        raise typer.BadParameter(f"{text!r} is out of range; give for example 5%")
    return fraction


def compare(
    before: Annotated[
        Path, typer.Argument(metavar="A.json", parser=user_path, help="A report of `fastvlm bench --json`.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B.json", parser=user_path, help="A later one.")],
    threshold: Annotated[
        float, typer.Option(parser=_percentage, metavar="PERCENT", help="How much slower a median may be.")
    ] = "5%",  # type: ignore[assignment]
) -> None:
    """Compare two reports: exit code 3 if a TTFT or the decode rate of B is worse than A's by more than the threshold.

    Prints the medians of every row that both reports have. A change that the scatter of all samples explains is noise
    and counts as none. If each report is about one model, these are compared even if their names differ. What was not
    the same in the two measurements goes to stderr.
    """
    from fastvlm_mlx.bench.report import compare_reports, different_conditions, read_report

    first, second = read_report(before), read_report(after)
    for difference in different_conditions(first, second):
        note(f"not the same: {difference}")
    changes = compare_reports(first, second)
    for row, group in groupby(changes, key=lambda change: change.row):
        lines = [[row, "A", "B", "change", ""]]
        for change in group:
            medians = [_quantity(value, change.unit) for value in (change.before, change.after)]
            relative = f"{change.after / change.before - 1:+.1%}"
            lines.append([change.metric, *medians, relative, change.verdict(threshold)])
        show(as_text(lines))
    verdicts = [change.verdict(threshold) for change in changes]
    if noise := verdicts.count("noise"):
        note(f"noise: {noise} of {len(changes)} medians differ by more, but no more than their samples scatter")
    if slower := [change for change in changes if change.verdict(threshold) == "slower"]:
        note(f"{len(slower)} of {len(changes)} metrics are worse by more than {threshold:.0%}")
        raise typer.Exit(CHECK_FAILED)


def _quantity(value: float, unit: str) -> str:
    """A median with its unit, seconds as milliseconds."""
    return f"{1000 * value:.1f} ms" if unit == "s" else f"{value:.1f} {unit}"
