"""Conditions on a quantization report."""

import operator
import re
from dataclasses import dataclass

from fastvlm_mlx.convert.quantize.report import METRICS, QuantizationReport
from fastvlm_mlx.errors import ConversionError, GateError

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Gate:
    """A condition on a report, such as `top1>=0.95`.

    Attributes:
        metric: One of `METRICS`.
        comparison: `>=`, `<=`, `>` or `<`.
        limit: The value to compare with.
    """

    metric: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """The condition that a text describes.

        Raises:
            ConversionError: If it describes none.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(%?)\s*", text)
        if match is None:
            raise ConversionError(f"gate {text!r} cannot be read; write for instance 'top1>=0.95' or 'kl<0.05'")
        if match[1] not in METRICS:
            raise ConversionError(f"gate {text!r}: there is no metric {match[1]!r}; there are {', '.join(METRICS)}")
        return cls(match[1], match[2], float(match[3]) / (100 if match[4] else 1))

    def check(self, report: QuantizationReport) -> None:
        """Checks that a report meets the condition.

        Raises:
            GateError: If it does not.
        """
        value = report.metric(self.metric)
        if not _COMPARISONS[self.comparison](value, self.limit):
            raise GateError(
                f"the gate {self.metric}{self.comparison}{self.limit:g} is not met: {self.metric} is {value:.4g}; "
                "nothing was written"
            )
