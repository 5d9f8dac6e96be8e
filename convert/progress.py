"""Callbacks that report how far a conversion is."""

import itertools
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with the amount done, the amount in all and a label of the current step: bytes, or `Layers`."""

Notify = Callable[[str], None]
"""Called with a label of the current step."""


class Layers(int):
    """A number of layers; a progress callback counts in layers where a step takes long for each of them."""


class Meter:
    """Counts bytes or layers for a progress callback.

    Args:
        total: Bytes in all.
        progress: Called at every advance; None for nobody.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def advance(self, count: int, label: str) -> None:
        """Adds `count` bytes, done in the step called `label`."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, label)

    def notify(self, label: str) -> None:
        """Reports a step that is not counted in bytes."""
        self.advance(0, label)

    def layers(self, total: int, label: str) -> Notify:
        """A callback that reports one layer more, of `total`, whenever a layer is begun."""
        numbers = itertools.count()

        def begin(_: str) -> None:
            if self._progress is not None:
                self._progress(Layers(next(numbers)), Layers(total), label)

        return begin
