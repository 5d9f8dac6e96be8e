"""Reports as plots: the phases of every row as stacked bars."""

import io
from importlib.util import find_spec
from pathlib import Path

from fastvlm_mlx.bench.measure import PHASES
from fastvlm_mlx.bench.report import Report
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.outputs import write_output

PAPER = {896: ("0.5B", 0.166), 3584: ("7B", 0.641)}
"""Hidden size -> name and TTFT in seconds at `PAPER_PIXELS` that arXiv 2412.13303 gives for an M1 MacBook Pro."""

PAPER_PIXELS = 1024

SUFFIXES = (".svg", ".png", ".pdf")
"""The endings of files that plots are written to."""


def check_plot(path: Path) -> None:
    """Raises if `plot` could not draw to `path`.

    Raises:
        ConfigError: If matplotlib is missing, or the ending of `path` is not `.svg`, `.png` or `.pdf`.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'fastvlm-mlx[plot]'")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: plots are written as .svg, .png or .pdf")


def plot(report: Report, path: Path) -> None:
    """Draws the phases of every row as a stacked bar, with the wall TTFT as a mark, as SVG, PNG or PDF.

    Raises:
        ConfigError: As `check_plot` and `write_output`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = report.rows
    figure = Figure(figsize=(max(6.5, 1.2 * len(rows) + 3.5), 4.5), layout="constrained")
    axes = figure.add_subplot()
    bars = list(range(len(rows)))
    bottom = [0.0] * len(rows)
    for phase in PHASES[1:]:
        heights = [1000 * (row.median(phase) or 0.0) for row in rows]
        axes.bar(bars, heights, 0.6, bottom=bottom, label=phase.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    wall = [1000 * (row.median("wall_ttft") or 0.0) for row in rows]
    axes.plot(bars, wall, "k_", markersize=24, label="wall TTFT, measured whole")
    for bar, row in zip(bars, rows, strict=True):
        if row.pixels == PAPER_PIXELS and row.hidden_size in PAPER:
            name, seconds = PAPER[row.hidden_size]
            label = f"published, not measured: {name} at {PAPER_PIXELS} px\non an M1 MacBook Pro (arXiv 2412.13303)"
            ends = [bar - 0.45, bar + 0.45]
            axes.plot(ends, [1000 * seconds] * 2, "--", linewidth=1, color="grey", label=label)
    axes.set_xticks(bars, [f"{row.model}\n{row.size} px" for row in rows], fontsize=8)
    axes.set_ylabel("ms (medians)")
    axes.set_title(f"Time to first token on {report.conditions.machine.chip}", fontsize=10)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), fontsize=7, markerscale=0.5, loc="outside right upper")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    write_output(path, content.getvalue())
