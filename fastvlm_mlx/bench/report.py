"""Reports of `fastvlm bench`: what a file holds, how it is written, and how two of them compare."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.conditions import Conditions
from fastvlm_mlx.bench.records import record
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.errors import ConfigError

REPORT_VERSION = 1

COMPARED = ("wall_ttft", "cold_ttft", "paper_ttft", "decode_rate")
"""The metrics whose change counts as a regression; phases are parts of these, and noisier."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a report was measured.

    Attributes:
        prompt: The question.
        image_sha256: Of the image whose copies were shown; None for synthetic images.
        runs: Measured runs.
        warmup: Runs before these.
        max_tokens: Length of each answer.
    """

    prompt: str
    image_sha256: str | None
    runs: int
    warmup: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Numbers of tokens: of the prompt, its visual and its text part, and of the answer."""

    visual: int
    text: int
    prompt: int
    generated: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory.

    Attributes:
        peak_bytes: The most that MLX has allocated.
        active_bytes: What MLX holds at the end.
        process_peak_bytes: The most RAM that the process has held.
    """

    peak_bytes: int
    active_bytes: int
    process_peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one resolution.

    Attributes:
        model: Its name.
        weights_sha256: Of the weight files; None for random weights.
        source: Where the checkpoint was converted from, as its config says.
        hidden_size: Of the decoder.
        precision: What each part computes in, by part.
        resolution: As requested: pixels, `auto` or `native`.
        pixels: What that came to.
        tokens: Of the last run.
        memory: After the last run.
        metrics: By name.
    """

    model: str
    weights_sha256: str | None
    source: Mapping[str, Any]
    hidden_size: int
    precision: Mapping[str, str]
    resolution: int | str
    pixels: int
    tokens: Tokens
    memory: Memory
    metrics: Mapping[str, Metric] = field(repr=False)

    def median(self, metric: str) -> float | None:
        """Returns the median of a metric; None if the row does not have it."""
        return self.metrics[metric].statistics.median if metric in self.metrics else None

    @property
    def setup(self) -> tuple[str, str, str]:
        """What is measured apart from the model: the decoder's precision, the requested resolution and the pixels."""
        return self.precision["language_model"], str(self.resolution), str(self.pixels)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        metrics = {name: metric.to_dict() for name, metric in self.metrics.items()}
        flat = {name: value for name, value in vars(self).items() if name not in ("tokens", "memory", "metrics")}
        return {**flat, "tokens": asdict(self.tokens), "memory": asdict(self.memory), "metrics": metrics}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """Reads what `to_dict` returns.

        Raises:
            ConfigError: If a field is missing.
        """
        return record(
            cls,
            values,
            tokens=record(Tokens, values["tokens"]),
            memory=record(Memory, values["memory"]),
            metrics={name: Metric.from_dict(metric) for name, metric in values["metrics"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of `fastvlm bench`."""

    conditions: Conditions
    settings: Settings
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that is written to disk."""
        return {
            "fastvlm_bench": REPORT_VERSION,
            "conditions": self.conditions.to_dict(),
            "settings": asdict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Report":
        """Reads what `to_dict` returns.

        Raises:
            ConfigError: If it is something else, or a field is missing.
        """
        if not isinstance(values, Mapping) or values.get("fastvlm_bench") != REPORT_VERSION:
            raise ConfigError(f"not a report of `fastvlm bench --json` in format {REPORT_VERSION}")
        try:
            return cls(
                conditions=Conditions.from_dict(values["conditions"]),
                settings=record(Settings, values["settings"]),
                rows=tuple(Row.from_dict(row) for row in values["rows"]),
            )
        except KeyError as err:
            raise ConfigError(f"the report is damaged: {err} is missing") from err
        except (AttributeError, TypeError, ValueError) as err:
            raise ConfigError(f"the report is damaged: {err}") from err


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric of one row in two reports.

    Attributes:
        row: Model, precision and resolution.
        metric: Its name.
        unit: Of both medians.
        before: The median in the first report.
        after: The median in the second.
        slower: How much worse the second is, as a fraction of the first; negative where it is better.
    """

    row: str
    metric: str
    unit: str
    before: float
    after: float
    slower: float


def read_report(path: Path) -> Report:
    """Reads a report from disk.

    Raises:
        ConfigError: If the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ConfigError(f"{path}: not JSON ({err})") from err
    try:
        return Report.from_dict(values)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err


def compare_reports(before: Report, after: Report) -> list[Change]:
    """Returns the changes of every metric of `COMPARED` that both reports have, row by row.

    Rows are the same if model, precision and resolution are. If each report is about one model, the models' names may
    differ; `different_conditions` then names them.

    Raises:
        ConfigError: If the reports have no row in common.
    """
    models = _models(before), _models(after)
    if len(models[0]) == len(models[1]) == 1:
        first, second = ({("", *row.setup): row for row in report.rows} for report in (before, after))
    else:
        first, second = ({(row.model, *row.setup): row for row in report.rows} for report in (before, after))
    changes = []
    for key in sorted(first.keys() & second.keys(), key=lambda key: (first[key].model, first[key].pixels, key)):
        old_row, new_row = first[key], second[key]
        precision, resolution, _ = old_row.setup
        for metric in COMPARED:
            old, new = old_row.median(metric), new_row.median(metric)
            if old is not None and new is not None:
                changes.append(
                    Change(
                        row=f"{old_row.model}, {precision}, {resolution} px",
                        metric=metric,
                        unit=old_row.metrics[metric].unit,
                        before=old,
                        after=new,
                        slower=old / new - 1 if metric == "decode_rate" else new / old - 1,
                    )
                )
    if not changes:
        raise ConfigError("the two reports have no row in common: model, precision and resolution all have to agree")
    return changes


def _models(report: Report) -> list[str]:
    """The names of the report's models."""
    return list(dict.fromkeys(row.model for row in report.rows))


def different_conditions(before: Report, after: Report) -> Iterator[str]:
    """Yields what differs between two measurements, as `name: a, b`.

    Time, load and this package's version may differ, and memory by 1 %, which the system keeps for itself.
    """
    models = [" and ".join(map(repr, _models(report))) for report in (before, after)]
    if models[0] != models[1]:
        yield f"model: {models[0]}, {models[1]}"
    first, second = ({**report.conditions.to_dict(), **asdict(report.settings)} for report in (before, after))
    for name, value in first.items():
        if name in ("time", "load_average", "fastvlm_mlx"):
            continue
        if name == "memory" and math.isclose(value, second[name], rel_tol=0.01):
            continue
        if value != second[name]:
            yield f"{name}: {value}, {second[name]}"
