"""The table of characters is that of the tokenizers library; `python -m tests.inputs.test_characters` writes it."""

import itertools
import sys
import unicodedata
import zlib
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from fastvlm_mlx.inputs import characters

FILE = Path(characters.__file__).with_name("characters.bin")
# The other planes are empty or private; all of them is rare.
CHARACTERS = list(map(chr, (*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200))))


def members(expression: str) -> list[bool]:
    """Whether each of `CHARACTERS` belongs to a class, as the library says."""
    belongs = bytearray(b"\1" * len(CHARACTERS))
    splitter = pre_tokenizers.Split(Regex(expression), "removed")
    for _, (start, end) in splitter.pre_tokenize_str("".join(CHARACTERS)):
        belongs[start:end] = bytes(end - start)
    return [bool(member) for member in belongs]


def library_kinds() -> dict[str, str]:
    """What every character is to the library, in the letters of the table."""
    kinds = {}
    for char, is_letter, is_number, is_space in zip(
        CHARACTERS, members(r"\p{L}"), members(r"\p{N}"), members(r"\s"), strict=True
    ):
        if char in " '":
            kinds[char] = char
        elif is_letter:
            kinds[char] = next((letter for letter in "strevmld" if char.lower() == letter), "L")
        else:
            kinds[char] = "N" if is_number else "R" if char in "\r\n" else "S" if is_space else "O"
    kinds["\u017f"] = "s"  # the long s, which is an s where case does not count
    return kinds


def differently_composed(chars: list[str]) -> set[str]:
    """The characters that Python and the library compose or order differently; the library's data are older."""
    texts = [(unicodedata.normalize(form, c), c) for form in ("NFC", "NFD", "NFKD") for c in chars]
    texts += [(f"q{text}", c) for c in chars for text in (f"\u0315{c}", f"{c}\u0334")]
    if differing := _differing(texts):
        return {part for c in differing for part in (c, unicodedata.normalize("NFD", c)[-1])}
    marks = [c for c in chars if unicodedata.combining(c)]
    one_of_each = {unicodedata.combining(c): c for c in marks}.values()
    return _differing([(f"q{text}", c) for c in marks for mark in one_of_each for text in (c + mark, mark + c)])


def _differing(texts: list[tuple[str, str]]) -> set[str]:
    """The characters whose texts Python and the library compose differently."""
    joined = "\n".join(text for text, _ in texts)
    ours, theirs = unicodedata.normalize("NFC", joined).split("\n"), normalizers.NFC().normalize_str(joined).split("\n")
    return {char for our, their, (_, char) in zip(ours, theirs, texts, strict=True) if our != their}


def write() -> None:
    """Writes the table, in which all is rare that this Python does not know, or that may be composed differently."""
    kinds = {c: "?" if unicodedata.category(c) == "Cn" else kind for c, kind in library_kinds().items()}
    while differing := differently_composed([c for c, kind in kinds.items() if kind != "?" and c != "\n"]):
        kinds |= dict.fromkeys(differing, "?")
    table = "".join(kinds.get(chr(code), "?") for code in range(sys.maxunicode + 1))
    FILE.write_bytes(zlib.compress(table.encode("ascii"), 9))


def test_every_character_is_what_it_is_to_the_library_or_rare():
    table = zlib.decompress(FILE.read_bytes()).decode("ascii")
    assert len(table) == sys.maxunicode + 1
    differing = [c for c, kind in library_kinds().items() if table[ord(c)] not in (kind, "?")]
    assert differing == []


def test_only_characters_without_a_meaning_or_newer_ones_are_rare():
    table = zlib.decompress(FILE.read_bytes()).decode("ascii")
    common = [c for c in CHARACTERS if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    assert [c for c in common if table[ord(c)] == "?"] == []
    assert table[ord("🧑")] == "O"
    assert table[0xD800] == table[0x378] == "?"


def test_ascii_is_what_the_table_says():
    table = zlib.decompress(FILE.read_bytes()).decode("ascii")
    assert "".join(characters._ASCII) == table[:128]


def test_characters_are_composed_as_the_library_composes_them():
    table = zlib.decompress(FILE.read_bytes()).decode("ascii")
    common = [c for c in CHARACTERS if table[ord(c)] != "?" and unicodedata.category(c) != "Cn" and c != "\n"]
    assert differently_composed(common) == set()


PIECES = [
    "a",
    "S",
    "ſ",
    "'",
    "'ll",
    "'Ve",
    "é",
    "字",
    "1",
    "½",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\u3000",
    ".",
    "🙂",
    "\x1c",
]


@pytest.mark.parametrize("first", PIECES)
def test_texts_of_all_kinds_are_split_as_the_library_splits_them(first):
    splitter = pre_tokenizers.Split(Regex(characters.WORDS), "isolated")
    for others in itertools.product(PIECES, repeat=3):
        text = "".join((first, *others))
        assert characters.split(text) == [word for word, _ in splitter.pre_tokenize_str(text)], text


def test_a_text_with_a_rare_character_is_left_to_the_library():
    assert characters.split("a\u0378b") is None


if __name__ == "__main__":
    write()
