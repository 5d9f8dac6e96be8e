"""Reports of `fastvlm bench`: what a file holds, how it is written, and how two of them compare."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.conditions import Conditions
from fastvlm_mlx.bench.images import FORMAT, FORMATS, MEGAPIXELS
from fastvlm_mlx.bench.records import record
from fastvlm_mlx.bench.statistics import Metric, change_interval
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
        megapixels: Of the synthetic images; None for copies of a given one.
        form: The format of the images, by Pillow's name.
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
    megapixels: float | None = MEGAPIXELS
    form: str = FORMAT

    def median(self, metric: str) -> float | None:
        """Returns the median of a metric; None if the row does not have it."""
        return self.metrics[metric].statistics.median if metric in self.metrics else None

    @property
    def size(self) -> str:
        """The pixels for tables: `1024`, or `auto: 1024` where each image chose them."""
        return f"{self.resolution}: {self.pixels}" if str(self.resolution).startswith("auto") else str(self.pixels)

    @property
    def setup(self) -> tuple[str, str, str, str]:
        """What is measured apart from the model: the decoder's precision, the resolution, its pixels, other images."""
        size = "" if self.megapixels in (None, MEGAPIXELS) else f", images of {self.megapixels:g} megapixels"
        form = "" if self.megapixels is None or self.form == FORMAT else f", {FORMATS.get(self.form, self.form)}"
        return self.precision["language_model"], str(self.resolution), str(self.pixels), size + form

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
        low: The lower end of the 99 % interval of `slower`, from the scatter of all samples.
        high: Its upper end.
    """

    row: str
    metric: str
    unit: str
    before: float
    after: float
    slower: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """Returns `slower`, `faster`, or `noise` for a change that the samples' scatter explains; else nothing.

        Args:
            threshold: The change, as a fraction, up to which nothing is said.
        """
        if abs(self.slower) <= threshold:
            return ""
        if self.low <= 0 <= self.high:
            return "noise"
        return "slower" if self.slower > 0 else "faster"


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

    Rows are the same if model, precision, resolution and the size of the images are. If each report is about one model,
    the models' names may differ; `different_conditions` then names them.

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
        for metric in COMPARED:
            if metric in old_row.metrics and metric in new_row.metrics:
                row = f"{old_row.model}, {old_row.precision['language_model']}, {old_row.size} px{key[-1]}"
                changes.append(_change(row, metric, old_row.metrics[metric], new_row.metrics[metric]))
    if not changes:
        raise ConfigError(
            "the two reports have no row in common: model, precision, resolution and size of the images have to agree"
        )
    return changes


def _change(row: str, name: str, before: Metric, after: Metric) -> Change:
    """The change of one metric; a higher rate is a shorter time."""
    old, new = before.statistics.median, after.statistics.median
    worse = (after, before) if name == "decode_rate" else (before, after)
    low, high = change_interval(*(metric.samples for metric in worse))
    slower = worse[1].statistics.median / worse[0].statistics.median - 1
    return Change(row=row, metric=name, unit=before.unit, before=old, after=new, slower=slower, low=low, high=high)


def _models(report: Report) -> list[str]:
    """The names of the report's models."""
    return list(dict.fromkeys(row.model for row in report.rows))


def different_conditions(before: Report, after: Report) -> Iterator[str]:
    """Yields what differs between two measurements, as `name: a, b`.

    Time and this package's version may differ, load by 1, and memory by 1 %, which the system keeps for itself.
    """
    models = [" and ".join(map(repr, _models(report))) for report in (before, after)]
    if models[0] != models[1]:
        yield f"model: {models[0]}, {models[1]}"
    weights = [{row.model: row.weights_sha256 for row in report.rows} for report in (before, after)]
    for model in weights[0].keys() & weights[1].keys():
        digests = [each[model] for each in weights]
        if digests[0] != digests[1]:
            yield f"weights of {model!r}: {', '.join((digest or 'random')[:12] for digest in digests)}"
    first, second = ({**report.conditions.to_dict(), **asdict(report.settings)} for report in (before, after))
    for name, value in first.items():
        if name in ("time", "fastvlm_mlx"):
            continue
        if name == "load_average" and abs(value[0] - second[name][0]) <= 1:
            continue
        if name == "memory" and math.isclose(value, second[name], rel_tol=0.01):
            continue
        if value != second[name]:
            yield f"{name}: {value}, {second[name]}"
