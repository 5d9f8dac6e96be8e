"""Reports as tables: medians for people, every sample for a statistics program."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from fastvlm_mlx.bench.measure import STAGES
from fastvlm_mlx.bench.report import Row, median, row_key


def _milliseconds(row: Row, metric: str) -> str:
    seconds = median(row, metric)
    return "" if seconds is None else f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """The medians as text: a head and a line for each row, times in milliseconds; columns that are empty left out."""
    head = ["model", "precision", "px", "visual", "prompt", "wall TTFT", "p90", "cold TTFT", "paper TTFT"]
    lines = []
    for row in report["rows"]:
        precision = row["precision"]
        rate = median(row, "decode_rate")
        asked = row["resolution"]
        lines.append(
            [
                row["model"],
                precision["language_model"]
                if len(set(precision.values())) == 1
                else "/".join(dict.fromkeys(precision.values())),
                f"auto: {row['pixels']}" if asked == "auto" else str(row["pixels"]),
                str(row["tokens"]["visual"]),
                str(row["tokens"]["prompt"]),
                _milliseconds(row, "wall_ttft"),
                f"{1000 * row['metrics']['wall_ttft']['p90']:.1f}",
                _milliseconds(row, "cold_ttft"),
                _milliseconds(row, "paper_ttft"),
                *(_milliseconds(row, stage) for stage in STAGES),
                "" if rate is None else f"{rate:.1f}",
                f"{row['memory']['peak_bytes'] / 1e9:.2f}",
            ]
        )
    head += [stage.replace("_", " ") for stage in STAGES] + ["tokens/s", "peak GB"]
    kept = [column for column in range(len(head)) if any(line[column] for line in lines)]
    return [[line[column] for column in kept] for line in (head, *lines)]


def as_csv(report: Mapping[str, Any]) -> str:
    """Every sample on a line of its own, ready for a statistics program."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "precision", "resolution", "pixels", "metric", "unit", "run", "value"])
    for row in report["rows"]:
        for name, metric in row["metrics"].items():
            for run, value in enumerate(metric["samples"], start=1):
                writer.writerow([*row_key(row), name, metric["unit"], run, value])
    return text.getvalue()
