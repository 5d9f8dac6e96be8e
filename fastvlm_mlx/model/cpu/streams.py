"""Work divided among CPU streams, each of which is one thread."""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from fastvlm_mlx.backend import mx
from fastvlm_mlx.streams import worker_streams

Parts = list[mx.array]
"""A feature map (C, B, H, W) as parts (C/P, B, H, W), one for each of P streams."""


def after(x: mx.array, *before: mx.array) -> mx.array:
    """`x`, for what shall not begin until `before` is there: MLX begins all blocks of some work, if it may."""
    return mx.depends([x], list(before))[0] if before else x


class Streams:
    """Divides work among `count` CPU streams."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._calls = itertools.count()

    def each(self, run: Callable[..., Any], *parts: Iterable[Any]) -> list[Any]:
        """The results of `run` on the first element of every list of `parts`, the second, …, each on its own stream."""
        results = []
        for stream, *arguments in zip(worker_streams(self._count), *parts, strict=True):
            with mx.stream(stream):
                results.append(run(*arguments))
        return results

    def next(self) -> contextlib.AbstractContextManager[Any]:
        """One stream after the other, for work that is not in parts."""
        return mx.stream(worker_streams(self._count)[next(self._calls) % self._count])

    def split(self, array: mx.array) -> Parts:
        """Equal parts of the first axis, one per stream, without a copy."""
        return list(mx.split(array, self._count))
