"""Answers as sentences, and whether a sentence says anything new."""

from __future__ import annotations

import re
from collections.abc import Callable

from fastvlm_mlx.generation.stop import FirstSentence

_EMPTY = frozenset(
    "a an the is are was were be been being am and or of there here this that these those it its can be seen which "
    "we you see image picture photo photograph scene shows show showing depicts depicting visible".split()
)
"""Words that differ between two ways to say the same."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_ENDINGS = re.compile(r"(?<=\w{3})(?:ing|ed|es|s)$")
_UNCHANGED = re.compile(
    r"\W*(?:(?:(?:the|this) )?(?:scene|image|picture|view)?\s*(?:is|are|has|remains?|stays?|looks?)?\s*"
    r"(?:still |largely |mostly )?(?:unchanged|the same|not changed)(?: as before)?"
    r"|(?:there (?:is|are|have been) )?no (?:visible |significant )?changes?(?: in the (?:scene|image|picture))?"
    r"|nothing (?:has |is )?(?:changed|new|different)|same as before)\W*",
    re.IGNORECASE,
)


class Sentences:
    """Divides a text that grows into its sentences; a line of its own is one, too."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, text: str) -> list[str]:
        """Adds text; returns the sentences that are whole now."""
        self._text += text
        whole = []
        while (sentence := self._next()) is not None:
            if sentence.strip():
                whole.append(_one_line(sentence))
        return whole

    def finish(self) -> list[str]:
        """The rest, whether it is whole or not."""
        rest, self._text = _one_line(self._text), ""
        return [rest] if rest else []

    def _next(self) -> str | None:
        line, newline, after = self._text.partition("\n")
        first = FirstSentence()
        text, complete = first.add(line)
        if complete:
            self._text = line[len(text) :] + newline + after
            return text
        if newline:
            self._text = after
            return line
        return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def told(answer: str, clean: Callable[[str], str]) -> list[str]:
    """The sentences of a whole answer that say something, each as `clean` has it."""
    sentences = Sentences()
    return [clean(each) for each in (*sentences.add(answer), *sentences.finish()) if not says_nothing(each)]


def says_nothing(sentence: str) -> bool:
    """Whether a sentence only says that nothing has changed, or has no word."""
    return not _WORD.search(sentence) or _UNCHANGED.fullmatch(sentence) is not None


def same(first: str, second: str) -> bool:
    """Whether two sentences say the same: the same words in the same order, whatever their endings and little words.

    One other word is enough for a difference, since it may be the one that matters: a red light, a green light.

    >>> same("A man is sitting at a desk.", "The man sits at the desk.")
    True
    """
    return first == second or _content(first) == _content(second)


def _content(sentence: str) -> list[str]:
    words = [word.casefold() for word in _WORD.findall(sentence)]
    return [_stem(word) for word in words if word not in _EMPTY] or words


def _stem(word: str) -> str:
    """The word without an ending of English, and without the consonant that is doubled before one."""
    stem = _ENDINGS.sub("", word)
    return stem[:-1] if len(stem) < len(word) and len(stem) > 3 and stem[-1] == stem[-2] else stem
