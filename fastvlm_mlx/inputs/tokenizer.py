"""Qwen2's byte-level BPE: text -> token ids -> text, whole or streamed."""

from __future__ import annotations

import codecs
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.arguments import StrPath, as_whole, file_path, valid_text, whole_ids
from fastvlm_mlx.errors import CheckpointError, ConfigError, PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.schema import integer, mapping, read_object, read_small_file, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import tokenizers

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

MOST_TOKENS = 2**20
"""The most tokens of a vocabulary whose embedding is not known; Qwen2's has 151,646."""

# Qwen2's rule for splitting text into words (transformers, Qwen2Converter).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(folder: Path, rows: int = MOST_TOKENS) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a checkpoint from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Apple's releases have no `tokenizer.json`. Their added tokens come from `added_tokens.json` and
    `tokenizer_config.json`; without either, Qwen2's three follow the vocabulary.

    Args:
        folder: Holds the files.
        rows: Of the embedding; there cannot be more tokens.

    Raises:
        CheckpointError: If a file is missing or damaged, or there are more tokens than rows.
    """
    from tokenizers import AddedToken, Tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    data = read_small_file(path)
    if data is not None:
        with _library(path):
            tokenizer = Tokenizer.from_buffer(data)
            # A tokenizer.json can carry training-time truncation, which would cut prompts silently.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    else:
        tokenizer = _from_vocabulary(folder, rows)
        added = _added_tokens(folder, rows) or dict(
            enumerate((END_OF_TEXT, IM_START, IM_END), tokenizer.get_vocab_size())
        )
    with _library(folder):
        # All become special, whatever the files say: `encode_special_tokens` keeps special tokens out of a user's text.
        tokenizer.add_special_tokens(
            [AddedToken(content, special=True, normalized=False) for _, content in sorted(added.items())]
        )
        for index, content in sorted(added.items()):
            if (actual := tokenizer.token_to_id(content)) != index:
                raise CheckpointError(
                    f"{printable(folder)}: the added token {shown(content)} should have id {index} but gets {actual}"
                )
        if (count := tokenizer.get_vocab_size()) > rows:
            raise CheckpointError(f"{printable(folder)}: the tokenizer has {count} tokens, the embedding {rows} rows")
    return tokenizer


@contextmanager
def _library(path: Path) -> Iterator[None]:
    """Turns every error of the tokenizers library into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as err:  # it raises nothing narrower than Exception, and its panics are not even that
        if not (isinstance(err, Exception) or type(err).__name__ == "PanicException"):
            raise
        raise CheckpointError(f"{printable(path)}: not a tokenizer ({printable(err)}); fetch it again") from err


class Tokenizer:
    """The tokenizer of a checkpoint folder, built on first use, or in the background after `start`.

    Building holds the GIL for half a second; start it while MLX computes.

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

    def start(self) -> None:
        """Starts to build the tokenizer in the background, unless that has been done."""
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
            self.start()
            assert self._building is not None
            self._built = self._building.result()
        return self._built

    @cached_property
    def _added(self) -> dict[int, bytes]:
        return {index: token.content.encode() for index, token in self._backend.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; markup in it, such as `<|im_end|>`, stays text.

        Raises:
            CheckpointError: If the tokenizer is damaged.
            PromptError: If it is no text.
        """
        backend = self._backend
        valid_text(text, "the text")
        with _library(self._folder):
            ids = backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self._rows:
            raise self._beyond_rows(max(ids))
        return ids

    @cached_property
    def longest(self) -> int:
        """The most bytes of text that one token stands for; in the byte alphabet, a character is a byte."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=False)), default=1)

    def check_ids(self) -> None:
        """Checks that each token has an id of its own, and a row of the embedding.

        Raises:
            CheckpointError: If one has not.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        _check_ids(vocabulary, self._rows, printable(self._folder))

    def token_id(self, content: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: If the vocabulary lacks it.
        """
        index = self._backend.token_to_id(content)
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
        token = self._backend.id_to_token(token_id) if 0 <= token_id < MOST_TOKENS else None
        token = token or ""
        return bytes(_BYTES[char] for char in token) if _BYTES.keys() >= set(token) else token.encode()

    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """The bytes of every id up to the last, empty where there is no token; and the ids of the special tokens.

        Raises:
            CheckpointError: If two tokens have one id, or one is outside the embedding.
        """
        self.check_ids()
        names = self._backend.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(names.values(), default=-1) + 1)
        for name, index in names.items():
            try:
                tokens[index] = name.translate(_BYTES_OF_NAMES).encode("latin-1")
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
        """Writes `tokenizer.json` into `folder`."""
        self.check_ids()  # the library counts up to the largest id
        with _library(self._folder):
            text = self._backend.to_str(pretty=False)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")


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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTES_OF_NAMES = {ord(char): byte for char, byte in _BYTES.items()}


def _from_vocabulary(folder: Path, rows: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = folder / "vocab.json"
    vocab = read_object(path) or {}
    _check_ids(vocab, rows, printable(path))
    merges = _read_merges(folder / "merges.txt", vocab)
    with _library(path):
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _check_ids(vocabulary: Mapping[str, Any], rows: int, label: str) -> None:
    """Checks that every id of a vocabulary is a whole number of its own below `rows`."""
    ids = set(vocabulary.values()) if all(type(index) is int for index in vocabulary.values()) else {-1}
    if ids and min(ids) < 0:
        raise CheckpointError(f"{label}: must map tokens to whole numbers")
    if ids and max(ids) >= rows:
        raise CheckpointError(f"{label}: the tokenizer has id {shown(max(ids))}, the embedding {rows} rows")
    if len(ids) < len(vocabulary):
        tokens: dict[int, str] = {}
        for token, index in vocabulary.items():
            if (other := tokens.setdefault(index, token)) != token:
                raise CheckpointError(f"{label}: {shown(other)} and {shown(token)} have the same id, {index}")


def _read_merges(path: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    try:
        text = (read_small_file(path) or b"").decode("utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{printable(path)}: cannot be read ({err})") from err
    merges = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise CheckpointError(
                f"{printable(path)}: line {number} merges {shown(line)}, which does not fit vocab.json"
            )
        merges.append((left, right))
    return merges


def _added_tokens(folder: Path, rows: int) -> dict[int, str]:
    config, names = folder / "tokenizer_config.json", folder / "added_tokens.json"
    added: dict[int, str] = {}
    try:
        decoder = mapping((read_object(config) or {}).get("added_tokens_decoder", {}), "added_tokens_decoder")
        pairs = [
            (_parsed_id(index), mapping(token, f"token {index}").get("content")) for index, token in decoder.items()
        ]
        pairs += [(index, content) for content, index in (read_object(names) or {}).items()]
        for key, content in pairs:
            index = integer(key, "the id of an added token", least=0, most=rows - 1)
            if not isinstance(content, str):
                raise ConfigError(f"token {index} must be a text, not {shown(content)}")
            if (other := added.setdefault(index, content)) != content:
                raise ConfigError(f"{shown(other)} and {shown(content)} have the same id, {index}")
    except ConfigError as err:
        raise CheckpointError(
            f"{printable(folder)}: the added tokens in {config.name} or {names.name} are malformed: {err}"
        ) from err
    return added


def _parsed_id(key: str) -> int | str:
    """The id that a key of `added_tokens_decoder` stands for; the key itself if it is no number."""
    return int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else key
