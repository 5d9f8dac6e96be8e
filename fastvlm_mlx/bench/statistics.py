"""Times of evaluated work, and the statistics of a list of samples."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fastvlm_mlx.backend import mx

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a list of samples comes to."""

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
        """The statistics of at least one sample; the standard deviation of one is 0."""
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


class Stopwatch:
    """Seconds by stage; a stage ends when everything that it returns has been evaluated."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, run: Callable[[], _T]) -> _T:
        """What `run` returns, evaluated: an array, or any nesting of lists and dicts with arrays in it."""
        start = time.perf_counter()
        result = run()
        mx.eval(result)
        self.seconds[stage] = time.perf_counter() - start
        return result
