"""Queries as FTS5 takes them: whatever a user types is text, never an operator.

Chinese and Japanese are not written in words, so each of their characters is indexed as one: a run of them is found as
a phrase, wherever it is in a text, and may be a single character.
"""

import re
from typing import NewType

Expression = NewType("Expression", str)
"""A query in the syntax of FTS5."""

_UNSPACED = re.compile(r"([\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
"""Characters of scripts without spaces: ideographs and kana."""
_WORD = re.compile(r"[^\W_]+")
_SAYING_NOTHING = frozenset("a an the of in on at is are there any some this that with and or to picture photo".split())
MOST_WORDS = 64
"""Of a query; the others are left out."""


def plain(text: str) -> str:
    """A text as it is indexed: each character of a script without spaces is a word."""
    return _UNSPACED.sub(r" \1 ", text)


def is_unspaced(text: str) -> bool:
    """Whether a text has Chinese or Japanese in it."""
    return _UNSPACED.search(text) is not None


def terms(query: str) -> list[str]:
    """The words of a query that say something, each once; if none does, all of them.

    A run of Chinese or Japanese is one term.
    """
    found = [match.group() for part in query.split() for match in _WORD.finditer(_apart(part))]
    words = list(dict.fromkeys(word.casefold() for word in found))[:MOST_WORDS]
    return [word for word in words if word not in _SAYING_NOTHING] or words


def _apart(text: str) -> str:
    """A text with a space wherever a script without spaces begins or ends."""
    return " ".join(part for part in re.split(rf"((?:{_UNSPACED.pattern[1:-1]})+)", text) if part)


def any_of(words: list[str]) -> Expression:
    """Finds texts with at least one of some terms."""
    return Expression(" OR ".join(map(_quoted, words)))


def phrase(words: list[str]) -> Expression:
    """Finds texts with some terms one after the other."""
    return Expression(_quoted(" ".join(words)))


def _quoted(term: str) -> str:
    return f'"{plain(term).strip()}"'
