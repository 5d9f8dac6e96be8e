"""The text of an answer as it grows, and what ends it: strings, its first sentence, or a number of words."""

import re
from collections.abc import Callable, Sequence

from fastvlm_mlx.generation.words import WordLimit
from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer


class TextStream:
    """Turns token ids into text: whole characters only, and nothing from where the answer ends.

    Args:
        detokenizer: For this answer alone.
        stop: Strings that end the answer.
        sentence: Whether its first sentence ends it, too.
        max_words: How many words end it, those of `prefix` included.
        opening: See `Request`.
        prefix: What the text begins with, before the first token. No stop string and no end of a sentence in it counts.
    """

    def __init__(
        self,
        detokenizer: StreamingDetokenizer,
        stop: Sequence[str],
        *,
        sentence: bool = False,
        max_words: int | None = None,
        opening: Callable[[str], int] | None = None,
        prefix: str = "",
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._sentence = FirstSentence(prefix) if sentence else None
        self._words = None if max_words is None else WordLimit(max_words, opening, prefix)
        self._prefix = prefix

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the text; None if there is none, or if something else ended it before."""
        is_whole = any(limit is not None and limit.complete for limit in (self._sentence, self._words))
        return None if is_whole else self._stop.found

    def add(self, token: int) -> tuple[str, bool]:
        """Adds a token id; returns the text that can be shown now, and whether the answer ends with it."""
        return self._limited(*self._stop.add(self._detokenizer.add(token)))

    def finish(self) -> tuple[str, bool]:
        """Returns the text that was held back, and whether something has ended the answer in it."""
        text, ended = self._stop.add(self._detokenizer.finish())
        return self._limited(text if ended else text + self._stop.finish(), ended, last=True)

    def _limited(self, text: str, ended: bool, *, last: bool = False) -> tuple[str, bool]:
        """The part of the text within the first sentence and the number of words, after the prefix."""
        if self._sentence is not None:
            text, complete = self._sentence.add(text)
            ended = ended or complete
            text += self._sentence.finish() if last and not ended else ""
        if self._words is not None:
            text, complete = self._words.add(text)
            if (last or ended) and not complete:
                rest, complete = self._words.finish()
                text += rest
            ended = ended or complete
        prefix, self._prefix = self._prefix, ""
        return prefix + text, ended


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

    Args:
        before: What precedes the stream; a sentence that ends in it does not count.

    Attributes:
        complete: Whether the sentence has ended.
    """

    def __init__(self, before: str = "") -> None:
        self.complete = False
        self._text = before
        self._start = self._shown = len(before)

    def add(self, text: str) -> tuple[str, bool]:
        """Adds `text`; returns the part of the stream that can be shown now, and whether the sentence has ended."""
        self._text += text
        for match in _SENTENCE_END.finditer(self._text):
            if match.end() > self._start and self._ends(match):
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
