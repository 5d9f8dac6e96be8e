"""Reports as tables: medians for people, every sample for a statistics program."""

import csv
import io
from collections.abc import Sequence

from fastvlm_mlx.bench.images import FORMATS
from fastvlm_mlx.bench.measure import PHASES
from fastvlm_mlx.bench.report import Report, Row
from fastvlm_mlx.formatting import as_blocks

_TITLES = tuple(phase.replace("_", " ") for phase in PHASES)


def table(report: Report) -> list[list[str]]:
    """Returns a header and the medians of each row as text, times in milliseconds; leaves empty columns out."""
    return _table(report.rows)


def text(report: Report, width: int = 80) -> str:
    """Returns the table as text of at most `width` columns: for each model what a user waits for, then the phases."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.model, _precision(row)), []).append(row)
    return "\n\n".join(
        f"{model}, {precision}: medians of {report.settings.runs} runs, times in ms\n{_blocks(rows, width)}"
        for (model, precision), rows in groups.items()
    )


def _blocks(rows: Sequence[Row], width: int) -> str:
    """Returns the table of rows about one model, with the phases in one of their own."""
    columns = list(zip(*_table(rows), strict=True))[2:]
    phases = [column for column in columns if column[0] in _TITLES]
    parts = [column for column in columns if column not in phases], [columns[0], *phases]
    return "\n\n".join(as_blocks(list(zip(*part, strict=True)), width=width) for part in parts)


def _table(rows: Sequence[Row]) -> list[list[str]]:
    head = [
        "model",
        "precision",
        "px",
        "megapixels",
        "format",
        "visual",
        "prompt",
        "wall TTFT",
        "p90",
        "cold TTFT",
        "paper TTFT",
    ]
    head += [*_TITLES, "tokens/s", "peak GB"]
    lines = [_line(row) for row in rows]
    alike = [len({value(row) for row in rows}) == 1 for value in (lambda row: row.megapixels, lambda row: row.form)]
    lines = [
        [*line[:3], *("" if same else cell for same, cell in zip(alike, line[3:5], strict=True)), *line[5:]]
        for line in lines
    ]
    filled = [column for column in range(len(head)) if any(line[column] for line in lines)]
    return [[line[column] for column in filled] for line in (head, *lines)]


def _precision(row: Row) -> str:
    return "/".join(dict.fromkeys(row.precision.values()))


def _line(row: Row) -> list[str]:
    rate = row.median("decode_rate")
    return [
        row.model,
        _precision(row),
        row.size,
        "" if row.megapixels is None else f"{row.megapixels:g}",
        FORMATS.get(row.form, row.form),
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
    writer.writerow(
        ["model", "precision", "resolution", "pixels", "megapixels", "format", "metric", "unit", "run", "value"]
    )
    for row in report.rows:
        for name, metric in row.metrics.items():
            for run, value in enumerate(metric.samples, start=1):
                setup = *row.setup[:-1], "" if row.megapixels is None else row.megapixels, row.form
                writer.writerow([row.model, *setup, name, metric.unit, run, value])
    return text.getvalue()
