"""The text of an answer as it grows, and the strings that end it."""

from collections.abc import Sequence

from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer


class TextStream:
    """Turns token ids into text: whole characters only, and nothing from a stop string on.

    Args:
        detokenizer: For this answer alone.
        stop: Strings that end the answer.
    """

    def __init__(self, detokenizer: StreamingDetokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)

    def add(self, token: int) -> tuple[str, bool]:
        """Adds a token id; returns the text that can be shown now, and whether a stop string has ended it."""
        return self._stop.add(self._detokenizer.add(token))

    def finish(self) -> tuple[str, bool]:
        """Returns the text that was held back, and whether a stop string has ended it."""
        text, ended = self._stop.add(self._detokenizer.finish())
        return (text, True) if ended else (text + self._stop.finish(), False)


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
