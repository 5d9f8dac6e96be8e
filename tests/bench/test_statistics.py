import numpy as np
import pytest

from fastvlm_mlx.bench.statistics import Statistics


def test_statistics() -> None:
    found = Statistics.of([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.median, found.mean, found.min, found.max) == (4, 2.5, 2.5, 1.0, 4.0)
    assert found.std == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert Statistics.of([1.0]).std == 0.0
