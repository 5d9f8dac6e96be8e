"""Strings that end an answer."""

from collections.abc import Sequence


class StopStrings:
    """Ends a stream of text before the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Adds `text`; returns the part of the stream that can be shown now, and whether it has ended."""
        text = self._held + text
        ends = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """The text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
