"""The report of a quantization: what it saved and what it cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastvlm_mlx.convert.compare.agreement import Agreement
from fastvlm_mlx.convert.compare.weights import WeightError, errors_by_part
from fastvlm_mlx.convert.parts import by_part
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.formatting import as_markdown, names, readable_bytes

METRICS = ("visual_cosine", "kl", "top1", "top5", "greedy", "weight_error", "size_ratio", "bits_per_weight")
"""The metrics that a gate can name."""


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """The report on one part of the model.

    Attributes:
        bits_per_weight: Over all of its parameters, with scales and parameters in floating point.
        bytes_before: Bytes of its tensors in the source.
        bytes_after: Bytes of its tensors in the result.
        weight_error: Norm of the change of all its parameters, relative to their norm.
    """

    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    weight_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The report on a quantization.

    Attributes:
        quantization: The name of the request.
        parts: The report on each of `PARTS`.
        kept: The reason for each layer that stayed in floating point.
        agreement: The agreement with the source on calibration images and prompts.
        folder_bytes_before: Bytes of the source's files.
        folder_bytes_after: Bytes of the result's files, without this report and the model card.
    """

    quantization: str
    parts: Mapping[str, PartReport]
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
        """Bits per weight of the whole model."""
        weights = sum(8 * part.bytes_after / part.bits_per_weight for part in self.parts.values())
        return 8 * sum(part.bytes_after for part in self.parts.values()) / weights

    @property
    def size_ratio(self) -> float:
        """The size of the result's folder relative to that of the source."""
        return self.folder_bytes_after / self.folder_bytes_before

    def metric(self, name: str) -> float:
        """The value of one of `METRICS`."""
        value: float = getattr(self if hasattr(self, name) else self.agreement, name)
        return value

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
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
        """The agreement and the layers that stayed in floating point, in words."""
        agreement = self.agreement
        lines = [
            f"on calibration inputs, {agreement.positions} positions: the same token most likely {agreement.top1:.1%}, "
            f"of the five most likely {agreement.top5:.1%}, answers agree for {agreement.greedy:.1%} of their length",
            f"KL divergence {agreement.kl:.2g} nats, cosine of the visual tokens {agreement.visual_cosine:.4f}",
        ]
        reasons = sorted(set(self.kept.values()))
        for reason in reasons:
            paths = [path for path, given in self.kept.items() if given == reason]
            lines.append(f"in floating point ({reason}): {names(paths, most=3)}")
        return lines

    def markdown(self) -> str:
        """The section for the model card."""
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


def part_reports(source: Source, result: Source, errors: Mapping[str, WeightError]) -> dict[str, PartReport]:
    """The report on each part.

    Args:
        source: The source of the quantization.
        result: The quantized checkpoint.
        errors: The error of every parameter or layer, by its path.
    """
    before, after = (
        by_part({name: tensor.nbytes for name, tensor in opened.tensors.items()}) for opened in (source, result)
    )
    sizes = by_part({name: tensor.size for name, tensor in source.tensors.items()})
    return {
        part: PartReport(
            bits_per_weight=8 * after[part] / sizes[part],
            bytes_before=before[part],
            bytes_after=after[part],
            weight_error=error,
        )
        for part, error in errors_by_part(errors).items()
    }
