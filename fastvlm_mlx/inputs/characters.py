"""Qwen2's rule for splitting text into words, from a table of what each character is."""

from __future__ import annotations

import re
import unicodedata
import zlib
from functools import cache
from pathlib import Path

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The rule (transformers, Qwen2Converter) in the words of the tokenizers library, which knows `\\p{L}`."""

# Each character becomes a letter of these: a letter is L, unless it is one of a contraction; a number N; a space is
# itself, a line break R and other white space S; an apostrophe is itself, and everything else O.
_CONTRACTED = "strevmld"
_WORDS = re.compile(
    "'(?:s|t|re|ve|m|ll|d)|[^RNL"
    + _CONTRACTED
    + "]?[L"
    + _CONTRACTED
    + "]+|N| ?[O']+R*|[ SR]*R+|[ SR]+(?![^ SR])|[ SR]+"
)
RARE = "?"
"""What the table says of characters that are newer than the oldest Python, or that libraries may take for different."""


def split(text: str) -> list[str] | None:
    """Returns the words of a text, composed (NFC); None if it holds a rare character."""
    if text.isascii():
        kinds = text.translate(_ASCII)
    else:
        kinds = _kinds(text)
        if RARE not in kinds and (composed := unicodedata.normalize("NFC", text)) != text:
            text, kinds = composed, _kinds(composed)
        if RARE in kinds:
            return None
    return [text[match.start() : match.end()] for match in _WORDS.finditer(kinds)]


def _kinds(text: str) -> str:
    table, category = _table(), unicodedata.category  # this Python may be older than the table
    return "".join([RARE if category(char) == "Cn" else chr(table[ord(char)]) for char in text])


@cache
def _table() -> bytes:
    """Returns the kind of every code point; `tests/inputs/test_characters.py` writes it and proves it."""
    return zlib.decompress(Path(__file__).with_name("characters.bin").read_bytes())


def _kind(char: str) -> str:
    if char.isalpha():
        return char.lower() if char.lower() in _CONTRACTED else "L"
    if char.isdigit():
        return "N"
    if char in "\r\n":
        return "R"
    if char in "\t\v\f":
        return "S"
    return char if char in " '" else "O"


_ASCII = [_kind(chr(code)) for code in range(128)]
