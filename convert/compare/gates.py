"""Conditions on how far a checkpoint may differ from another one."""

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.schema import shown

AGREEMENT_METRICS = ("visual_cosine", "kl", "top1", "top5", "greedy")
"""The metrics of an `Agreement`."""

METRICS = (*AGREEMENT_METRICS, "weight_error", "size_ratio", "bits_per_weight")
"""The metrics of a `QuantizationReport`."""

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Measured(Protocol):
    """A comparison whose figures conditions can name."""

    def metric(self, name: str) -> float:
        """The value of a metric."""

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric; None for one that is exact."""


@dataclass(frozen=True)
class Gate:
    """A condition such as `top1>=0.95`.

    Attributes:
        metric: The name of a metric.
        comparison: `>=`, `<=`, `>` or `<`.
        limit: The value to compare with.
    """

    metric: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str, metrics: Collection[str] = METRICS) -> "Gate":
        """The condition that a text describes; `metrics` are those that it may name.

        Raises:
            ConversionError: If it describes none.
        """
        if not isinstance(text, str):
            raise ConversionError(f"a gate must be a text such as 'top1>=0.95', not {shown(text)}")
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(%?)\s*", text)
        if match is None:
            raise ConversionError(f"gate {text!r} cannot be read; write for instance 'top1>=0.95' or 'kl<0.05'")
        if match[1] not in metrics:
            raise ConversionError(f"gate {text!r}: there is no metric {match[1]!r}; there are {', '.join(metrics)}")
        return cls(match[1], match[2], float(match[3]) / (100 if match[4] else 1))

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.limit:g}"

    def holds(self, measured: Measured) -> bool:
        """Whether a comparison meets it; a figure that is not a number does not."""
        return bool(_COMPARISONS[self.comparison](measured.metric(self.metric), self.limit))

    def sentence(self, measured: Measured) -> str:
        """Whether a comparison meets it, and the figure: `the gate top1>=0.95 is met: top1 is 0.97 (…)`."""
        interval = measured.interval(self.metric)
        spread = f" (95% interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
        verdict = "met" if self.holds(measured) else "not met"
        return f"the gate {self} is {verdict}: {self.metric} is {measured.metric(self.metric):.4g}{spread}"
