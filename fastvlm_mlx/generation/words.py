"""Words as a person counts them, and an answer that ends after some of them."""

import re
from collections.abc import Callable, Iterator
from itertools import islice

_UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003fffd"
)
"""Characters of Chinese and Japanese, which each count as a word."""
_MARKS = "\u3099-\u309c\ufe00-\ufe0f\uff9e\uff9f\U000e0100-\U000e01ef"
"""What belongs to the character before it."""
_BETWEEN = "\\s\u2014\u3001-\u3004\u3008-\u3020\u3030\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
"""Spaces, dashes and wide punctuation."""
_RUN = re.compile(f"[{_UNSPACED}][{_MARKS}]*|[^{_BETWEEN}{_UNSPACED}]+")
_CLOSING = ".!?\u2026\u3002\uff01\uff1f\"'\u201d\u2019\u00bb)]\u300d\u300f\uff09\u3011"
"""What may follow a word at the end of a text."""
_DANGLING = re.compile(r"[,;:&/(\[{\u060c\u2018\u201c\u201e\u00ab\u2013-]+[\"'\u2019\u201d)\]]*$")
_OPENING_WORDS = 10
"""The most words of a phrase that is removed from the beginning; with fewer, one may yet be coming."""


def count_words(text: str) -> int:
    """Returns how many words a text has, as a person counts them; a Chinese or Japanese character is one.

    >>> count_words("A well-known dog \u2014 it's 3.5 years old.")
    7
    """
    return sum(1 for _ in _ends(text, 0))


def first_words(text: str, count: int) -> str:
    """Returns the beginning of a text with as many words, without a comma or the like behind the last one."""
    ends = list(islice(_ends(text, 0), count + 1))
    return text[: _cut(text, ends[count - 1])] if len(ends) > count else text


class WordLimit:
    """Ends a stream of text behind a number of words.

    Args:
        count: The number.
        opening: Returns how many characters at the beginning of a text will be removed, so that their words do
            not count. Nothing is shown before the end with it.
        before: What precedes the stream; its words count.

    Attributes:
        complete: Whether the words are there, and more would have followed.
    """

    def __init__(self, count: int, opening: Callable[[str], int] | None = None, before: str = "") -> None:
        self.complete = False
        self._count = count
        self._opening = opening
        self._text = before
        self._shown = len(before)

    def add(self, text: str) -> tuple[str, bool]:
        """Adds `text`; returns the part of the stream that can be shown now, and whether it has ended."""
        self._text += text
        enough = self._count if self._opening is None else max(self._count, _OPENING_WORDS)
        ends = self._word_ends(enough)
        if len(ends) > enough or (len(ends) == enough and self._text[ends[-1] :].lstrip(_CLOSING)):
            self.complete = True
            return self._show(_cut(self._text, ends[self._count - 1])), True
        if self._opening is not None:
            return "", False
        return self._show(_cut(self._text, ends[-1]) if len(ends) == self._count else len(self._text)), False

    def finish(self) -> tuple[str, bool]:
        """Returns the text that was held back, and whether that is all of the stream that there is room for."""
        ends = self._word_ends(self._count)
        self.complete = len(ends) > self._count
        end = _cut(self._text, ends[self._count - 1]) if len(ends) >= self._count else len(self._text)
        return self._show(end), self.complete

    def _word_ends(self, most: int) -> list[int]:
        """Where the words end that count, one more than `most` at the most."""
        start = 0 if self._opening is None else self._opening(self._text)
        return list(islice(_ends(self._text, start), most + 1))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]


def _ends(text: str, start: int) -> Iterator[int]:
    """Where each word from `start` on ends, with what is attached to it."""
    for match in _RUN.finditer(text, start):
        if any(map(str.isalnum, match.group())):
            yield match.end()


def _cut(text: str, end: int) -> int:
    """Where a text ends whose last word ends at `end`: with a full stop that follows, without a comma."""
    end = len(text) - len(text[end:].lstrip(_CLOSING))
    dangling = _DANGLING.search(text[:end])
    return dangling.start() if dangling else end
