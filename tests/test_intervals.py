import math

import pytest

from fastvlm_mlx.intervals import of_mean, wilson


def test_the_interval_of_a_share_is_wilsons() -> None:
    """The example of the NIST/SEMATECH handbook: 4 of 20."""
    assert wilson(0.2, 20) == pytest.approx((0.08066, 0.41602), abs=1e-5)


def test_all_of_few_are_not_certain() -> None:
    low, high = wilson(1.0, 36)
    assert (round(low, 3), high) == (0.904, 1.0)


def test_the_interval_of_a_mean_comes_from_its_standard_error() -> None:
    low, high = of_mean([1.0, 2.0, 3.0, 4.0])
    assert (low + high) / 2 == 2.5
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(5 / 3 / 4))
    assert of_mean([0.0, 0.0, 3.0], least=0.0)[0] == 0.0
    assert of_mean([7.0]) == (7.0, 7.0)
