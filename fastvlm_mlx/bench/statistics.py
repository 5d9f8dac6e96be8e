"""Statistics of samples, and a stopwatch for lazy arrays."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.errors import ConfigError

_T = TypeVar("_T")
_RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Median, mean, spread and percentiles of a list of samples."""

    n: int
    median: float
    mean: float
    std: float
    min: float
    p90: float
    p95: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Statistics":
        """Returns the statistics of at least one sample; the standard deviation of one is 0."""
        values = np.asarray(samples, dtype=np.float64)
        median, p90, p95 = np.percentile(values, [50, 90, 95]).tolist()
        return cls(
            n=len(values),
            median=median,
            mean=float(values.mean()),
            std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            min=float(values.min()),
            p90=p90,
            p95=p95,
            max=float(values.max()),
        )


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The samples of one metric, at least one.

    Attributes:
        unit: `s` or `tokens/s`.
        samples: In the order in which they were measured.

    Raises:
        ConfigError: If there are no samples.
    """

    unit: str
    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        """Rejects a metric without samples."""
        if not self.samples:
            raise ConfigError("a metric has no samples")

    @cached_property
    def statistics(self) -> Statistics:
        """The statistics of the samples."""
        return Statistics.of(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object with the unit, the statistics and the samples."""
        return {"unit": self.unit, **asdict(self.statistics), "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metric":
        """Reads what `to_dict` returns; computes the statistics again."""
        return cls(unit=values["unit"], samples=tuple(map(float, values["samples"])))


def change_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Returns the 99 % interval of the relative change of a median, bootstrapped from all samples.

    Few samples, or scattered ones, give a wide interval; single ones tell nothing about their scatter, so it has no
    width there. The same samples give the same interval.
    """
    random = np.random.default_rng(0)
    first, second = (
        np.median(random.choice(np.asarray(samples), (_RESAMPLES, len(samples))), axis=1) for samples in (before, after)
    )
    low, high = np.percentile(second / first - 1, [0.5, 99.5]).tolist()
    return low, high


class Stopwatch:
    """Seconds by phase; a phase ends when everything that it returns has been evaluated.

    Args:
        clock: Returns seconds from any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    def time(self, phase: str, run: Callable[[], _T]) -> _T:
        """Returns the evaluated result of `run`: an array, or any nesting of lists and dicts that holds arrays."""
        start = self._clock()
        result = run()
        mx.eval(result)
        self.seconds[phase] = self._clock() - start
        return result
