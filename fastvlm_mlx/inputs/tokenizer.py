"""Qwen2's byte-level BPE: text -> token ids -> text, whole or streamed."""

from __future__ import annotations

import codecs
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.arguments import StrPath, as_whole, file_path, valid_text, whole_ids
from fastvlm_mlx.errors import CheckpointError, PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.token_tables import TABLES_FILE, TokenTables, make_tables, read_tables
from fastvlm_mlx.inputs.tokenizer_files import (
    BYTES,
    BYTES_OF_NAMES,
    MOST_TOKENS,
    build_tokenizer,
    check_ids,
    library_errors,
)
from fastvlm_mlx.outputs import write_output
from fastvlm_mlx.schema import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    import tokenizers


class Tokenizer:
    """The tokenizer of a checkpoint folder, ready on first use, or in the background after `start`.

    It uses the tables of `tokenizer.bin`, where the folder has them. Without, and for what they leave to it, the
    tokenizers library builds its own; that holds the GIL for half a second, so start it while MLX computes.

    Args:
        folder: Holds `tokenizer.json`, or `vocab.json` and `merges.txt`.
        rows: Of the embedding, for which all ids have to be.

    Raises:
        CheckpointError: If `folder` holds neither.
    """

    def __init__(self, folder: StrPath, rows: int = MOST_TOKENS) -> None:
        self._folder = Path(
            os.path.abspath(file_path(folder, "folder"))
        )  # it may be read later, from another working folder
        self._rows = rows
        names = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if os.path.isfile(self._folder / name)}
        if not names & {"tokenizer.json"} and len(names) < 2:
            raise CheckpointError(
                f"{printable(folder)}: has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"
            )
        self._building: Future[tokenizers.Tokenizer] | None = None
        self._built: tokenizers.Tokenizer | None = None
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as of `pickle`, reads the files anew."""
        return Tokenizer, (self._folder, self._rows)

    @cached_property
    def _read(self) -> tuple[TokenTables | None, str]:
        """The tables, and what is wrong with them."""
        try:
            return read_tables(self._folder), ""
        except (ValueError, CheckpointError) as err:
            return None, printable(err)

    @property
    def _tables(self) -> TokenTables | None:
        return self._read[0]

    @property
    def damage(self) -> str:
        """Why the tables of the folder cannot be used; empty if they can, or if there are none."""
        return self._read[1]

    def start(self) -> None:
        """Reads the tables; without, starts to build the library's tokenizer in the background if that is not done."""
        if self._tables is None:
            self._start_building()

    def _start_building(self) -> None:
        if self._building is None or (self._built is None and self._process != os.getpid()):
            self._process = os.getpid()  # a forked process lacks the thread that builds it
            executor = ThreadPoolExecutor(1, "tokenizer")
            self._building = executor.submit(self._build)
            executor.shutdown(wait=False)

    def _build(self) -> tokenizers.Tokenizer:
        backend = build_tokenizer(self._folder, self._rows)
        backend.encode_special_tokens = True  # markup in the text is text
        return backend

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        if self._built is None:
            self._start_building()
            assert self._building is not None
            self._built = self._building.result()
        return self._built

    @cached_property
    def _added(self) -> dict[int, bytes]:
        if self._tables is not None:
            return self._tables.added
        return {index: token.content.encode() for index, token in self._backend.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; markup in it, such as `<|im_end|>`, stays text.

        Raises:
            CheckpointError: If the tokenizer is damaged.
            PromptError: If it is no text.
        """
        valid_text(text, "the text")
        ids = None if self._tables is None else self._tables.encode(text)
        if ids is None:
            backend = self._backend
            with library_errors(self._folder):
                ids = backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self._rows:
            raise self._beyond_rows(max(ids))
        return ids

    @cached_property
    def longest(self) -> int:
        """The most bytes of text that one token stands for; in the byte alphabet, a character is a byte."""
        if self._tables is not None:
            return self._tables.longest
        return max(map(len, self._backend.get_vocab(with_added_tokens=False)), default=1)

    def check_ids(self) -> None:
        """Checks that each token has an id of its own, and a row of the embedding.

        Raises:
            CheckpointError: If one has not.
        """
        if self._tables is None:
            check_ids(self._backend.get_vocab(with_added_tokens=True), self._rows, printable(self._folder))
        elif len(self._tables) > self._rows:
            raise self._beyond_rows(len(self._tables) - 1)

    def token_id(self, content: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: If the vocabulary lacks it.
        """
        ids = (index for index, added in self._added.items() if added == content.encode())
        index: int | None = next(ids, None) or self._backend.token_to_id(content)
        if index is None:
            raise CheckpointError(
                f"{printable(self._folder)}: the tokenizer has no {content}; is this a FastVLM checkpoint?"
            )
        if index >= self._rows:
            raise self._beyond_rows(index)
        return index

    def _beyond_rows(self, index: int) -> CheckpointError:
        folder = printable(self._folder)
        return CheckpointError(f"{folder}: the tokenizer has id {index}, the embedding {self._rows} rows")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The UTF-8 bytes of a token, possibly part of a character; empty for an id without a token.

        Raises:
            PromptError: If it is no whole number.
        """
        if as_whole(token_id) is None:
            raise PromptError(f"a token id must be a whole number, not {shown(token_id)}")
        if token_id in self._added:
            return b"" if skip_special_tokens else self._added[token_id]
        if self._tables is not None:
            return self._tables.token(token_id)
        token = self._backend.id_to_token(token_id) if 0 <= token_id < MOST_TOKENS else None
        token = token or ""
        return bytes(BYTES[char] for char in token) if BYTES.keys() >= set(token) else token.encode()

    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """The bytes of every id up to the last, empty where there is no token; and the ids of the special tokens.

        Raises:
            CheckpointError: If two tokens have one id, or one is outside the embedding.
        """
        self.check_ids()
        if self._tables is not None:
            return self._tables.tokens(), list(self._added)
        names = self._backend.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(names.values(), default=-1) + 1)
        for name, index in names.items():
            try:
                tokens[index] = name.translate(BYTES_OF_NAMES).encode("latin-1")
            except UnicodeEncodeError:  # it is not in the byte alphabet
                tokens[index] = name.encode()
        for index, content in self._added.items():
            tokens[index] = content
        return tokens, list(self._added)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            PromptError: If these are no whole numbers.
        """
        parts = (self.token_bytes(index, skip_special_tokens=skip_special_tokens) for index in whole_ids(token_ids))
        return b"".join(parts).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into `folder`, and its tables."""
        description = self._description()
        (Path(folder) / "tokenizer.json").write_bytes(description)
        self._write_tables(Path(folder), description)

    def save_tables(self) -> None:
        """Writes the tables of the folder's `tokenizer.json`.

        Raises:
            CheckpointError: If the tokenizer is damaged.
            ConfigError: If they cannot be written.
        """
        self._write_tables(self._folder, (self._folder / "tokenizer.json").read_bytes())

    def _write_tables(self, folder: Path, source: bytes) -> None:
        tables = make_tables(source, self._description(), self.vocabulary()[0])
        if tables is not None:
            write_output(folder / TABLES_FILE, tables)

    def _description(self) -> bytes:
        """What the library writes into `tokenizer.json`."""
        self.check_ids()  # the library counts up to the largest id
        with library_errors(self._folder):
            text: str = self._backend.to_str(pretty=False)
        return text.encode()


class StreamingDetokenizer:
    """Turns one token at a time into whole characters; together, these are the text of `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes; possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
