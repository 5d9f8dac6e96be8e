import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.statistics import Statistics, Stopwatch


def test_statistics() -> None:
    statistics = Statistics.of([4.0, 1.0, 3.0, 2.0])
    assert (statistics.n, statistics.median, statistics.mean, statistics.min, statistics.max) == (4, 2.5, 2.5, 1.0, 4.0)
    assert statistics.std == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert Statistics.of([1.0]).std == 0.0


def test_a_phase_ends_when_its_result_is_evaluated() -> None:
    held: list[int] = []

    def clock() -> float:
        held.append(mx.get_active_memory())
        return float(len(held))

    watch = Stopwatch(clock)
    size = 1 << 22
    result = watch.time("add", lambda: {"sums": [mx.zeros(size) + 1]})  # lazy until it is evaluated
    assert held[1] - held[0] >= 4 * size
    assert watch.seconds == {"add": 1.0}
    assert result["sums"][0].shape == (size,)
