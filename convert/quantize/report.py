"""What a quantization cost: the report that is written beside the weights, and gates on it."""

import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.convert.compare.agreement import Agreement
from fastvlm_mlx.convert.quantize.scheme import PARTS, part_of
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import as_markdown, names, readable_bytes

REPORT_FILE = "quantization_report.json"

METRICS = ("visual_cosine", "kl", "top1", "top5", "greedy", "weight_error", "size_ratio", "bits_per_weight")
"""What a gate can ask for."""

Squares = tuple[float, float]
"""The sum of the squares of the change of a layer's weights, and of the weights themselves."""

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, kw_only=True)
class PartLoss:
    """One part of the model.

    Attributes:
        bits_per_weight: Over everything in it, scales and what stayed in floating point included.
        bytes_before: Of its tensors in the source.
        bytes_after: Of its tensors in the result.
        weight_error: Norm of the change of all its parameters, relative to their norm.
    """

    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    weight_error: float


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """What a quantization cost.

    Attributes:
        quantization: What was asked for.
        parts: By the names of `PARTS`.
        kept: Layers that stayed in floating point, and why.
        agreement: With the source, on calibration pictures and prompts.
        folder_bytes_before: Of the source's files.
        folder_bytes_after: Of the result's files, this report and the model card not included.
    """

    quantization: str
    parts: Mapping[str, PartLoss]
    kept: Mapping[str, str]
    agreement: Agreement
    folder_bytes_before: int
    folder_bytes_after: int

    @property
    def weight_error(self) -> float:
        """The largest of the parts' errors."""
        return max(part.weight_error for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model."""
        weights = sum(8 * part.bytes_after / part.bits_per_weight for part in self.parts.values())
        return 8 * sum(part.bytes_after for part in self.parts.values()) / weights

    @property
    def size_ratio(self) -> float:
        """Of the folders, after to before."""
        return self.folder_bytes_after / self.folder_bytes_before

    def metric(self, name: str) -> float:
        """One of `METRICS`."""
        value: float = getattr(self if hasattr(self, name) else self.agreement, name)
        return value

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {**asdict(self), **{name: self.metric(name) for name in METRICS}}

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of text for a table: part, bits per weight, bytes before and after, relative weight error."""
        parts = [
            (
                name,
                f"{part.bits_per_weight:.2f}",
                readable_bytes(part.bytes_before),
                readable_bytes(part.bytes_after),
                f"{part.weight_error:.2%}",
            )
            for name, part in self.parts.items()
        ]
        before, after = readable_bytes(self.folder_bytes_before), readable_bytes(self.folder_bytes_after)
        return [*parts, ("all files", f"{self.bits_per_weight:.2f}", before, after, f"{self.weight_error:.2%}")]

    def lines(self) -> list[str]:
        """The agreement and what stayed in floating point, in words."""
        found = self.agreement
        lines = [
            f"on calibration inputs, {found.positions} positions: the same token likeliest {found.top1:.1%}, "
            f"of the five likeliest {found.top5:.1%}, answers agree for {found.greedy:.1%} of their length",
            f"KL divergence {found.kl:.2g} nats, cosine of the visual tokens {found.visual_cosine:.4f}",
        ]
        reasons = sorted(set(self.kept.values()))
        for reason in reasons:
            paths = [path for path, own in self.kept.items() if own == reason]
            lines.append(f"in floating point ({reason}): {names(paths, most=3)}")
        return lines

    def markdown(self) -> str:
        """The section of the model card."""
        header = ("part", "bits per weight", "before", "after", "weight error")
        return "\n".join(
            [
                "## What quantization cost",
                "",
                f"Quantized with fastvlm-mlx: {self.quantization}. Compared with the source:",
                "",
                as_markdown([header, *self.rows()]),
                "",
                *(f"- {line}" for line in self.lines()),
                "",
            ]
        )


@dataclass(frozen=True)
class Gate:
    """A condition on a report, such as `top1>=0.95`."""

    metric: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """The condition that a text describes.

        Raises:
            ConversionError: If it is not one.
        """
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(%?)\s*", text)
        if found is None:
            raise ConversionError(f"gate {text!r} cannot be read; write for instance 'top1>=0.95' or 'kl<0.05'")
        if found[1] not in METRICS:
            raise ConversionError(f"gate {text!r}: there is no metric {found[1]!r}; there are {', '.join(METRICS)}")
        return cls(found[1], found[2], float(found[3]) / (100 if found[4] else 1))

    def check(self, report: LossReport) -> None:
        """Lets a report pass that meets the condition.

        Raises:
            ConversionError: If it does not.
        """
        value = report.metric(self.metric)
        if not _COMPARISONS[self.comparison](value, self.limit):
            raise ConversionError(
                f"the gate {self.metric}{self.comparison}{self.limit:g} is not met: {self.metric} is {value:.4g}; "
                "nothing was written"
            )


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, the report and the model card not included."""
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.is_file() and file.name not in (REPORT_FILE, "README.md")
    )


def part_losses(source: Source, result: Source, squares: Mapping[str, Squares]) -> dict[str, PartLoss]:
    """The losses by part.

    Args:
        source: What was quantized.
        result: What became of it.
        squares: Of every parameter by its path.
    """
    losses = {}
    for part in PARTS:
        before, after = (
            [tensor for name, tensor in opened.tensors.items() if part_of(name) == part] for opened in (source, result)
        )
        own = [value for path, value in squares.items() if part_of(path) == part]
        change, norm = (sum(value[i] for value in own) for i in (0, 1))
        losses[part] = PartLoss(
            bits_per_weight=8 * sum(tensor.nbytes for tensor in after) / sum(tensor.size for tensor in before),
            bytes_before=sum(tensor.nbytes for tensor in before),
            bytes_after=sum(tensor.nbytes for tensor in after),
            weight_error=(change / norm) ** 0.5 if norm else 0.0,
        )
    return losses
