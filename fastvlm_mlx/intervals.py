"""95 % intervals of shares and means."""

import math
from collections.abc import Sequence

Z95 = 1.959964
"""Half-width of a 95 % interval in standard deviations."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of `count` trials; it holds the share itself."""
    spread = 1 + Z95**2 / count
    centre = (share + Z95**2 / (2 * count)) / spread
    half = Z95 / spread * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    # The share lies within its interval, whatever rounding makes of the ends at 0 and 1.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def of_mean(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    """The interval of the mean of at least one value, by its standard error, between the least and the most possible.

    A single value says nothing about its spread: its interval has no width.
    """
    count = len(values)
    mean = math.fsum(values) / count
    half = Z95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)
    return max(least, mean - half), min(most, mean + half)
