"""Qwen2's tokenizer as tables that are used as they lie in a file: it is ready when that has been read.

The tokenizers library decodes megabytes of JSON and builds hash tables for most of a second. The file `tokenizer.bin`
beside `tokenizer.json` holds the same as sorted numbers. It is derived from the JSON, whose length and checksum it
knows, and says the same: where a text is unusually long or holds rare characters, the library is asked instead.

The file is a header, then little-endian numbers, then the bytes of all tokens:

    pairs     uint64 (merges)      left << 32 | right, in ascending order
    results   uint64 (merges)      rank << 32 | id of what the pair becomes
    offsets   uint32 (tokens + 1)  where the bytes of each token begin
    bytes     uint32 (256)         the id of each byte
    added     uint32 (added)       ids of the added tokens
    texts     uint8  (…)           the bytes of all tokens
"""

from __future__ import annotations

import struct
import sys
import zlib
from bisect import bisect_left
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.inputs.characters import WORDS, split
from fastvlm_mlx.inputs.tokenizer_files import BYTES
from fastvlm_mlx.schema import parse_object, read_small_file

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLES_FILE = "tokenizer.bin"
_MAGIC = b"fastvlm\x01"
_HEADER = struct.Struct("<8sIIQIIII")
"""The mark, the checksum of all that follows it, that of the JSON, the JSON's length; how many merges, tokens and added
tokens there are; the longest token."""
_CHECKED = 12
"""What is checked begins here."""
_LONGEST_TEXT, _LONGEST_WORD = 1 << 14, 1 << 9
"""The most characters of a text, and bytes of a word, that are not left to the library."""
_NEVER = 1 << 64
_RULE = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
}


class TokenTables:
    """The tokenizer of a file of tables.

    Args:
        data: The content of the file, which `read_tables` has checked.

    Attributes:
        longest: The most bytes of a token that is not an added one.
        added: The bytes of the added tokens, by their ids.
    """

    def __init__(self, data: bytes) -> None:
        self.longest: int
        *_, merges, tokens, added, self.longest = _HEADER.unpack_from(data)
        rest = memoryview(data)[_HEADER.size :]

        def taken(size: int) -> memoryview[int]:
            nonlocal rest
            part, rest = rest[:size], rest[size:]
            return part

        self._pairs, self._results = taken(8 * merges).cast("Q"), taken(8 * merges).cast("Q")
        self._offsets, self._bytes = taken(4 * (tokens + 1)).cast("I"), taken(4 * 256).cast("I")
        ids = taken(4 * added).cast("I")
        self._texts = bytes(rest)
        self.added = {index: self.token(index) for index in ids}

    def token(self, index: int) -> bytes:
        """The bytes of a token; empty for an id without one."""
        return self._texts[self._offsets[index] : self._offsets[index + 1]] if 0 <= index < len(self) else b""

    def __len__(self) -> int:
        """One more than the last id."""
        return len(self._offsets) - 1

    def tokens(self) -> list[bytes]:
        """The bytes of all tokens, in the order of their ids."""
        return [self._texts[start:end] for start, end in pairwise(self._offsets)]

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text, in which nothing is markup; None if the library has to be asked."""
        words = split(text) if len(text) <= _LONGEST_TEXT else None
        if words is None:
            return None
        ids: list[int] = []
        for word in words:
            data = word.encode()
            if len(data) > _LONGEST_WORD:
                return None
            ids += self._merged([self._bytes[byte] for byte in data])
        return ids

    def _merged(self, ids: list[int]) -> list[int]:
        """The tokens of a word: of all neighbours that merge, those of the lowest rank do, the first ones first."""
        results = [self._result(left, right) for left, right in pairwise(ids)]
        while results and (result := min(results)) != _NEVER:
            at = results.index(result)
            ids[at : at + 2] = [result & 0xFFFFFFFF]
            del results[at]
            if at < len(results):
                results[at] = self._result(ids[at], ids[at + 1])
            if at:
                results[at - 1] = self._result(ids[at - 1], ids[at])
        return ids

    def _result(self, left: int, right: int) -> int:
        """The rank of a merge and the id of its result, as one number."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        return self._results[at] if at < len(self._pairs) and self._pairs[at] == pair else _NEVER


def read_tables(folder: Path) -> TokenTables | None:
    """The tables in a folder; None if there are none.

    Raises:
        ValueError: If they are damaged, or not those of the `tokenizer.json` beside them.
    """
    data = read_small_file(folder / TABLES_FILE)
    if data is None or sys.byteorder != "little":
        return None
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise ValueError("is not a file of this version")
    _, checksum, json_checksum, json_length, merges, tokens, added, _ = _HEADER.unpack_from(data)
    if zlib.crc32(data[_CHECKED:]) != checksum or _HEADER.size + _size(merges, tokens, added) > len(data):
        raise ValueError("is damaged")
    source = read_small_file(folder / "tokenizer.json") or b""
    if (len(source), zlib.crc32(source)) != (json_length, json_checksum):
        raise ValueError("is of another tokenizer.json")
    return TokenTables(data)


def _size(merges: int, tokens: int, added: int) -> int:
    """The bytes of all tables but the last."""
    return 16 * merges + 4 * (tokens + 1) + 4 * 256 + 4 * added


def make_tables(source: bytes, description: bytes, tokens: Sequence[bytes]) -> bytes | None:
    """The content of `tokenizer.bin`; None if the library does not tokenize as the tables do.

    Args:
        source: The content of the `tokenizer.json` beside it.
        description: What the library writes into such a file.
        tokens: The bytes of all tokens, in the order of their ids.
    """
    values = parse_object(description, "tokenizer.json")
    model, added = values["model"], values["added_tokens"]
    as_here = (
        all(values[key] == rule for key, rule in _RULE.items())
        and all((model.get(key) or None) == (value or None) for key, value in _MODEL.items())
        and all(token["special"] for token in added)
        and model["vocab"].keys() >= BYTES.keys()
    )
    if not as_here:
        return None
    vocab: dict[str, int] = model["vocab"]
    results = {
        vocab[left] << 32 | vocab[right]: rank << 32 | vocab[left + right]
        for rank, (left, right) in enumerate(model["merges"])
    }
    if len(results) < len(model["merges"]):
        return None  # a pair that merges twice
    pairs = sorted(results)
    ids = {byte: vocab[name] for name, byte in BYTES.items()}
    parts = [
        struct.pack(f"<{len(pairs)}Q", *pairs),
        struct.pack(f"<{len(pairs)}Q", *(results[pair] for pair in pairs)),
        struct.pack(f"<{len(tokens) + 1}I", *accumulate(map(len, tokens), initial=0)),
        struct.pack("<256I", *(ids[byte] for byte in range(256))),
        struct.pack(f"<{len(added)}I", *(token["id"] for token in added)),
        *tokens,
    ]
    longest = max(len(tokens[index]) for index in vocab.values())
    header = _HEADER.pack(_MAGIC, 0, zlib.crc32(source), len(source), len(pairs), len(tokens), len(added), longest)
    content = b"".join((header[_CHECKED:], *parts))
    return header[:8] + struct.pack("<I", zlib.crc32(content)) + content
