"""The text of an answer as it grows, and what ends it: strings, or its first sentence."""

import re
from collections.abc import Sequence

from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer


class TextStream:
    """Turns token ids into text: whole characters only, and nothing from a stop string on.

    Args:
        detokenizer: For this answer alone.
        stop: Strings that end the answer.
        sentence: Whether its first sentence ends it, too.
    """

    def __init__(self, detokenizer: StreamingDetokenizer, stop: Sequence[str], *, sentence: bool = False) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._sentence = FirstSentence() if sentence else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text; None if there is none, or if a sentence ended it before."""
        is_whole = self._sentence is not None and self._sentence.complete
        return None if is_whole else self._stop.found

    def add(self, token: int) -> tuple[str, bool]:
        """Adds a token id; returns the text that can be shown now, and whether a stop string has ended it."""
        return self._within_sentence(*self._stop.add(self._detokenizer.add(token)))

    def finish(self) -> tuple[str, bool]:
        """Returns the text that was held back, and whether a stop string has ended it."""
        text, ended = self._stop.add(self._detokenizer.finish())
        text, ended = self._within_sentence(text if ended else text + self._stop.finish(), ended)
        return (text, ended) if ended or self._sentence is None else (text + self._sentence.finish(), False)

    def _within_sentence(self, text: str, ended: bool) -> tuple[str, bool]:
        if self._sentence is None:
            return text, ended
        text, complete = self._sentence.add(text)
        return text, ended or complete


class StopStrings:
    """Ends a stream of text before the first stop string, holding back what may be the beginning of one.

    Attributes:
        found: The stop string that ended it; None while there is none.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Adds `text`; returns the part of the stream that can be shown now, and whether it has ended."""
        text = self._held + text
        if found := [stop for stop in self._stop if stop in text]:
            self._held, self.found = "", min(found, key=text.find)
            return text[: text.find(self.found)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """The text that was held back."""
        held, self._held = self._held, ""
        return held


_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]*]*(?=\s+(\S))|[。！？]+[」』”’]*(?=\s*(\S))")
_NO_WORD = re.compile(r"[\W_]")
_ABBREVIATIONS = frozenset("mr mrs ms dr st mt prof sr jr vs no fig approx".split())


class FirstSentence:
    """Ends a stream of text behind its first sentence.

    What follows a full stop decides whether it ends one, so spaces are held back until that is known: no sentence
    begins with a small letter. Neither do `Dr.`, `J.` and the `1.` of a list end one.

    Attributes:
        complete: Whether the sentence has ended.
    """

    def __init__(self) -> None:
        self.complete = False
        self._text = ""
        self._shown = 0

    def add(self, text: str) -> tuple[str, bool]:
        """Adds `text`; returns the part of the stream that can be shown now, and whether the sentence has ended."""
        self._text += text
        for match in _SENTENCE_END.finditer(self._text):
            if self._ends(match):
                self.complete = True
                return self._show(match.end()), True
        return self._show(len(self._text.rstrip())), False

    def finish(self) -> str:
        """The text that was held back."""
        return self._show(len(self._text))

    def _ends(self, match: "re.Match[str]") -> bool:
        before = self._text[: match.start()]
        word = _NO_WORD.split(before)[-1]
        following = match[1] or match[2]
        if match.group() != ".":
            return bool(before.strip()) and not following.islower()
        is_list = word.isdigit() and before.strip() == word
        is_short = (len(word) == 1 and word.isalpha()) or word.casefold() in _ABBREVIATIONS
        return bool(before.strip()) and not (following.islower() or is_list or is_short)

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
