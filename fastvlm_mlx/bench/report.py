"""Reports of measurements: their files, tables and plots, and the comparison of two of them."""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import ConfigError

FORMAT_VERSION = 1
Row = dict[str, Any]

COMPARED = ("wall_ttft", "cold_ttft", "paper_ttft", "decode_rate")
"""The metrics of which a change counts as a regression; stages are parts of these, and noisier."""


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


def median(row: Row, metric: str) -> float | None:
    """Returns the median of a metric; None if the row lacks it."""
    found = row["metrics"].get(metric)
    return None if found is None else found["median"]


def row_key(row: Row) -> tuple[str, ...]:
    """Returns what identifies a row: model, precision, requested resolution and pixels."""
    return (row["model"], row["precision"]["language_model"], str(row["resolution"]), str(row["pixels"]))


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The changes of every metric of `COMPARED` that both reports have, row by row.

    Rows are the same if model, precision and resolution are; where each report has one model, its name may differ.

    Raises:
        ConfigError: If no row of the two is the same.
    """
    anonymous = all(len({row["model"] for row in report["rows"]}) == 1 for report in (before, after))
    first, second = ({row_key(row)[anonymous:]: row for row in report["rows"]} for report in (before, after))
    changes = []
    for key in first.keys() & second.keys():
        name = ", ".join((first[key]["model"], *key[-3:-1])) + " px"
        for metric in COMPARED:
            old, new = median(first[key], metric), median(second[key], metric)
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
