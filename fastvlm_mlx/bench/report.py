"""Reports of measurements: their files, tables and plots, and the comparison of two of them."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.measure import STAGES
from fastvlm_mlx.errors import ConfigError

FORMAT_VERSION = 1
Row = dict[str, Any]

COMPARED = ("wall_ttft", "cold_ttft", "paper_ttft", "decode_rate")
"""The metrics of which a change counts as a regression; stages are parts of these, and noisier."""

PAPER = {896: ("0.5B", 0.166), 3584: ("7B", 0.641)}
"""Hidden size -> name and TTFT in seconds at 1024 px that arXiv 2412.13303 gives for an M1 MacBook Pro."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one row in two reports.

    Attributes:
        row: Model, dtype and resolution.
        metric: Its name.
        before: The median in the first report.
        after: The median in the second.
        slower: By how much the second is worse, as a fraction of the first; negative where it is better.
    """

    row: str
    metric: str
    before: float
    after: float
    slower: float


def make_report(conditions: Mapping[str, Any], settings: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """A report as it is written to disk."""
    return {
        "fastvlm_bench": FORMAT_VERSION,
        "conditions": dict(conditions),
        "settings": dict(settings),
        "rows": list(rows),
    }


def check_output(path: Path) -> None:
    """Accepts a path that `write_output` can write, before anything is measured for it; what is there stays.

    Raises:
        ConfigError: If the folder is missing, or the file cannot be written.
    """
    with _refused(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_stream(path):
            return
        if path.exists():
            path.open("ab").close()
        partial = _partial(path)
        partial.touch()
        partial.unlink()


def write_output(path: Path, content: bytes) -> None:
    """Writes a file at once: a reader finds what was there before, or all of `content`.

    Raises:
        ConfigError: If it cannot be written.
    """
    partial = _partial(path)
    with _refused(path):
        if _is_stream(path):
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            os.replace(partial, os.path.realpath(path))
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Makes an error of the operating system one that names `path`."""
    try:
        yield
    except OSError as err:
        raise ConfigError(f"{path}: cannot be written ({err.strerror or err})") from err


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, which nothing can take the place of."""
    return path.exists() and not path.is_file()


def _partial(path: Path) -> Path:
    """Where the content of `path` is written first: beside the file, or beside what it links to."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def read_report(path: Path) -> dict[str, Any]:
    """A report from disk.

    Raises:
        ConfigError: If it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ConfigError(f"{path}: not JSON ({err})") from err
    if not isinstance(report, dict) or report.get("fastvlm_bench") != FORMAT_VERSION:
        raise ConfigError(f"{path}: not a report of `fastvlm bench --json` in format {FORMAT_VERSION}")
    return report


def _median(row: Row, metric: str) -> float | None:
    found = row["metrics"].get(metric)
    return None if found is None else found["median"]


def _key(row: Row) -> tuple[str, ...]:
    return (row["model"], row["precision"]["language_model"], str(row["resolution"]), str(row["pixels"]))


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The changes of every metric of `COMPARED` that both reports have, row by row.

    Rows are the same if model, precision and resolution are; where each report has one model, its name may differ.

    Raises:
        ConfigError: If no row of the two is the same.
    """
    anonymous = all(len({row["model"] for row in report["rows"]}) == 1 for report in (before, after))
    first, second = ({_key(row)[anonymous:]: row for row in report["rows"]} for report in (before, after))
    changes = []
    for key in first.keys() & second.keys():
        name = ", ".join((first[key]["model"], *key[-3:-1])) + " px"
        for metric in COMPARED:
            old, new = _median(first[key], metric), _median(second[key], metric)
            if old is not None and new is not None:
                slower = old / new - 1 if metric == "decode_rate" else new / old - 1
                changes.append(Change(row=name, metric=metric, before=old, after=new, slower=slower))
    if not changes:
        raise ConfigError("the two reports have no row in common: model, precision and resolution all have to agree")
    return sorted(changes, key=lambda change: (change.row, COMPARED.index(change.metric)))


def different_conditions(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What was not the same in two measurements, as `name: a, b`; time, load and this package's version may differ."""
    names = [name for name in before["conditions"] if name not in ("time", "load_average", "fastvlm_mlx")]
    for part in ("conditions", "settings"):
        for name in names if part == "conditions" else before[part]:
            values = [report[part].get(name) for report in (before, after)]
            if values[0] != values[1]:
                yield f"{name}: {values[0]}, {values[1]}"


def _milliseconds(row: Row, metric: str) -> str:
    seconds = _median(row, metric)
    return "" if seconds is None else f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """The medians as text: a head and a line for each row, times in milliseconds; columns that are empty left out."""
    head = ["model", "precision", "px", "visual", "prompt", "wall TTFT", "p90", "cold TTFT", "paper TTFT"]
    lines = []
    for row in report["rows"]:
        precision = row["precision"]
        rate = _median(row, "decode_rate")
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
                writer.writerow([*_key(row), name, metric["unit"], run, value])
    return text.getvalue()


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
        heights = [1000 * (_median(row, stage) or 0.0) for row in rows]
        axes.bar(places, heights, 0.6, bottom=bottom, label=stage.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    wall = [1000 * (_median(row, "wall_ttft") or 0.0) for row in rows]
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
