"""Reports as plots: the stages of every row as stacked bars."""

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.measure import STAGES
from fastvlm_mlx.bench.report import median, write_output
from fastvlm_mlx.errors import ConfigError

PAPER = {896: ("0.5B", 0.166), 3584: ("7B", 0.641)}
"""Hidden size -> name and TTFT in seconds at 1024 px that arXiv 2412.13303 gives for an M1 MacBook Pro."""


def check_plot(path: Path) -> None:
    """Accepts a kind of file that `plot` can draw, before anything is measured for it.

    Raises:
        ConfigError: If matplotlib is missing, or the ending of `path` is not `.svg`, `.png` or `.pdf`.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'fastvlm-mlx[plot]'")
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"{path}: plots are written as .svg, .png or .pdf")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws the stages of every row stacked, with its wall TTFT, as SVG, PNG or PDF.

    Raises:
        ConfigError: As `check_plot` and `write_output`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(max(6.0, 1.2 * len(rows) + 2), 4.5), layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(rows)))
    bottom = [0.0] * len(rows)
    for stage in STAGES[1:]:
        heights = [1000 * (median(row, stage) or 0.0) for row in rows]
        axes.bar(places, heights, 0.6, bottom=bottom, label=stage.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    wall = [1000 * (median(row, "wall_ttft") or 0.0) for row in rows]
    axes.plot(places, wall, "k_", markersize=24, label="wall TTFT, unstaged")
    for hidden_size in {row["hidden_size"] for row in rows} & PAPER.keys():
        name, seconds = PAPER[hidden_size]
        label = f"published, not measured: {name} at 1024 px on an M1 MacBook Pro (arXiv 2412.13303)"
        axes.axhline(1000 * seconds, linestyle="--", linewidth=1, color="grey")
        axes.annotate(label, (-0.3, 1000 * seconds), color="grey", fontsize=7, va="bottom")
    names = [f"{row['model']}\n{row['resolution']}" for row in rows]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_ylabel("ms (medians)")
    chip = report["conditions"]["chip"]
    axes.set_title(f"Time to first token on {chip}", fontsize=10)
    axes.legend(fontsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:])
    write_output(path, drawn.getvalue())
