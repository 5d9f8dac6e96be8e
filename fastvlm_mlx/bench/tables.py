"""Reports as tables: medians for people, every sample for a statistics program."""

import csv
import io

from fastvlm_mlx.bench.measure import PHASES
from fastvlm_mlx.bench.report import Report, Row


def table(report: Report) -> list[list[str]]:
    """Returns a header and the medians of each row as text, times in milliseconds; leaves empty columns out."""
    head = ["model", "precision", "px", "visual", "prompt", "wall TTFT", "p90", "cold TTFT", "paper TTFT"]
    head += [*(phase.replace("_", " ") for phase in PHASES), "tokens/s", "peak GB"]
    lines = [_line(row) for row in report.rows]
    filled = [column for column in range(len(head)) if any(line[column] for line in lines)]
    return [[line[column] for column in filled] for line in (head, *lines)]


def _line(row: Row) -> list[str]:
    precisions = list(dict.fromkeys(row.precision.values()))
    rate = row.median("decode_rate")
    return [
        row.model,
        "/".join(precisions),
        f"auto: {row.pixels}" if row.resolution == "auto" else str(row.pixels),
        str(row.tokens.visual),
        str(row.tokens.prompt),
        _milliseconds(row, "wall_ttft"),
        f"{1000 * row.metrics['wall_ttft'].statistics.p90:.1f}",
        _milliseconds(row, "cold_ttft"),
        _milliseconds(row, "paper_ttft"),
        *(_milliseconds(row, phase) for phase in PHASES),
        "" if rate is None else f"{rate:.1f}",
        f"{row.memory.peak_bytes / 1e9:.2f}",
    ]


def _milliseconds(row: Row, metric: str) -> str:
    seconds = row.median(metric)
    return "" if seconds is None else f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def as_csv(report: Report) -> str:
    """Returns CSV with one line for each sample."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "precision", "resolution", "pixels", "metric", "unit", "run", "value"])
    for row in report.rows:
        for name, metric in row.metrics.items():
            for run, value in enumerate(metric.samples, start=1):
                writer.writerow([row.model, *row.setup, name, metric.unit, run, value])
    return text.getvalue()
