"""The report of a quantization: what it saved and what it cost."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from fastvlm_mlx.convert.compare.agreement import Agreement
from fastvlm_mlx.convert.compare.gates import METRICS, Gate
from fastvlm_mlx.convert.compare.weights import WeightError, errors_by_part
from fastvlm_mlx.convert.parts import part_of
from fastvlm_mlx.convert.quantize.scheme import kept_lines
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.errors import GateError
from fastvlm_mlx.formatting import as_markdown, readable_bytes


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """The report on one part of the model, or on all quantized layers.

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

    def resized(self, bytes_after: int) -> "PartReport":
        """The report on the same weights, stored in another number of bytes."""
        bits_per_weight = self.bits_per_weight * bytes_after / self.bytes_after
        return replace(self, bytes_after=bytes_after, bits_per_weight=bits_per_weight)

    def row(self, name: str) -> tuple[str, str, str, str, str]:
        """A row of text: name, bits per weight, bytes before and after, relative weight error."""
        before, after = readable_bytes(self.bytes_before), readable_bytes(self.bytes_after)
        return name, f"{self.bits_per_weight:.2f}", before, after, f"{self.weight_error:.2%}"


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The report on a quantization.

    Attributes:
        quantization: The name of the request.
        parts: The report on each of `PARTS`.
        quantized_layers: The report on the layers that are quantized, from all parts.
        target_bpw: The bits per weight that these were allowed; None if no target was set.
        kept: The reason for each layer that stayed in floating point.
        agreement: The agreement with the source on calibration images and prompts.
        folder_bytes_before: Bytes of the source's files.
        folder_bytes_after: Bytes of the result's files, without this report and the model card.
        gates: The conditions that were set, such as `top1>=0.95`.
    """

    quantization: str
    parts: Mapping[str, PartReport]
    quantized_layers: PartReport
    target_bpw: float | None
    kept: Mapping[str, str]
    agreement: Agreement
    folder_bytes_before: int
    folder_bytes_after: int
    gates: tuple[str, ...] = ()

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

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric; None for one that is exact."""
        interval: tuple[float, float] | None = self.agreement.interval(name)
        return interval

    def check_gates(self) -> None:
        """Checks that the conditions are met.

        Raises:
            GateError: If one is not. It carries this report.
        """
        gates = [Gate.parse(text) for text in self.gates]
        if unmet := [gate.sentence(self) for gate in gates if not gate.holds(self)]:
            raise GateError(f"{'; '.join(unmet)}; nothing was written", self)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), **{name: self.metric(name) for name in METRICS}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationReport":
        """Reads what `to_dict` returns.

        Raises:
            KeyError: If a value is missing.
            TypeError: If one has the wrong type.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        agreement = dict(known["agreement"])
        intervals = {name: (low, high) for name, (low, high) in agreement.pop("intervals").items()}
        known |= {
            "parts": {name: PartReport(**part) for name, part in known["parts"].items()},
            "quantized_layers": PartReport(**known["quantized_layers"]),
            "agreement": Agreement(**agreement, intervals=intervals),
            "gates": tuple(known["gates"]),
        }
        return cls(**known)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of text for a table: part, bits per weight, bytes before and after, relative weight error."""
        before, after = readable_bytes(self.folder_bytes_before), readable_bytes(self.folder_bytes_after)
        worst = f"worst part {self.weight_error:.2%}"
        return [
            *(part.row(name) for name, part in self.parts.items()),
            self.quantized_layers.row("quantized layers"),
            ("all files", f"{self.bits_per_weight:.2f}", before, after, worst),
        ]

    def lines(self) -> list[str]:
        """The agreement, targets and gates, and the layers that stayed in floating point, in words."""
        lines = self.agreement.lines()
        if self.target_bpw is not None:
            used = self.quantized_layers.bits_per_weight
            verdict = "met" if used <= self.target_bpw + 1e-6 else "not met"
            lines.append(
                f"target of {self.target_bpw:g} bits per weight {verdict}: the quantized layers take {used:.2f}"
            )
        lines += [Gate.parse(text).sentence(self) for text in self.gates]
        return [*lines, *kept_lines(self.kept)]

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
    return {
        part: _report(source, result, error, partial(_is_in, part)) for part, error in errors_by_part(errors).items()
    }


def layers_report(
    source: Source, result: Source, errors: Mapping[str, WeightError], layers: Collection[str]
) -> PartReport:
    """The report on the layers at the paths `layers`; other arguments as for `part_reports`."""
    error = WeightError.total(errors[path] for path in layers).relative
    return _report(source, result, error, partial(_is_weight_of, layers))


def _is_in(part: str, name: str) -> bool:
    return bool(part_of(name) == part)


def _is_weight_of(layers: Collection[str], name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return path in layers and leaf in ("weight", "scales", "biases")


def _report(source: Source, result: Source, error: float, holds: Callable[[str], bool]) -> PartReport:
    """The report on the tensors whose names `holds` accepts."""
    before, after = (
        sum(tensor.nbytes for name, tensor in opened.tensors.items() if holds(name)) for opened in (source, result)
    )
    weights = sum(tensor.size for name, tensor in source.tensors.items() if holds(name))
    return PartReport(bits_per_weight=8 * after / weights, bytes_before=before, bytes_after=after, weight_error=error)
