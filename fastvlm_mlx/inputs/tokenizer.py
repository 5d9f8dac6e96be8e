"""Qwen2's byte-level BPE: text -> token ids -> text, whole or streamed."""

from __future__ import annotations

import codecs
import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import tokenizers

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# Qwen2's rule for splitting text into words (transformers, Qwen2Converter).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Builds the tokenizer of a checkpoint from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Apple's releases have no `tokenizer.json`. Their added tokens come from `added_tokens.json` and
    `tokenizer_config.json`; without either, Qwen2's three follow the vocabulary.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    from tokenizers import AddedToken, Tokenizer

    folder = Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{path}: not a tokenizer ({err}); fetch it again") from err
        # A tokenizer.json can carry training-time truncation, which would cut prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    else:
        tokenizer = _from_vocabulary(folder)
        added = _added_tokens(folder) or dict(enumerate((END_OF_TEXT, IM_START, IM_END), tokenizer.get_vocab_size()))
    for index, content in sorted(added.items()):
        # All become special, whatever the files say: `encode_special_tokens` keeps special tokens out of a user's text.
        tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        if (actual := tokenizer.token_to_id(content)) != index:
            raise CheckpointError(f"{folder}: the added token {content!r} should have id {index} but gets {actual}")
    return tokenizer


class Tokenizer:
    """The tokenizer of a checkpoint folder, built on first use, or in the background after `start`.

    Building holds the GIL for half a second; start it while MLX computes.

    Args:
        folder: Holds `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: If `folder` holds neither.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        names = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (self._folder / name).is_file()}
        if not names & {"tokenizer.json"} and len(names) < 2:
            raise CheckpointError(f"{folder}: has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
        self._building: Future[tokenizers.Tokenizer] | None = None

    def start(self) -> None:
        """Starts to build the tokenizer in the background, unless that has been done."""
        if self._building is None:
            executor = ThreadPoolExecutor(1, "tokenizer")
            self._building = executor.submit(self._build)
            executor.shutdown(wait=False)

    def _build(self) -> tokenizers.Tokenizer:
        backend = build_tokenizer(self._folder)
        backend.encode_special_tokens = True  # markup in the text is text
        return backend

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        self.start()
        assert self._building is not None
        return self._building.result()

    @cached_property
    def _added(self) -> dict[int, bytes]:
        return {index: token.content.encode() for index, token in self._backend.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; markup in it, such as `<|im_end|>`, stays text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def token_id(self, content: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: If the vocabulary lacks it.
        """
        index = self._backend.token_to_id(content)
        if index is None:
            raise CheckpointError(f"{self._folder}: the tokenizer has no {content}; is this a FastVLM checkpoint?")
        return index

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The UTF-8 bytes of a token, possibly part of a character; empty for an id without a token."""
        if token_id in self._added:
            return b"" if skip_special_tokens else self._added[token_id]
        token = self._backend.id_to_token(token_id) or ""
        return bytes(_BYTES[char] for char in token) if _BYTES.keys() >= set(token) else token.encode()

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        parts = (self.token_bytes(index, skip_special_tokens=skip_special_tokens) for index in token_ids)
        return b"".join(parts).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` into `folder`."""
        self._backend.save(str(Path(folder) / "tokenizer.json"), pretty=False)


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


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = _read_json(folder / "vocab.json")
    if not all(isinstance(index, int) for index in vocab.values()):
        raise CheckpointError(f"{folder / 'vocab.json'}: must map tokens to whole numbers")
    merges = _read_merges(folder / "merges.txt", vocab)
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


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise CheckpointError(f"{path}: line {number} merges {line!r}, which does not fit vocab.json")
        merges.append((left, right))
    return merges


def _added_tokens(folder: Path) -> dict[int, str]:
    added: dict[int, str] = {}
    config, names = folder / "tokenizer_config.json", folder / "added_tokens.json"
    try:
        if config.is_file():
            decoder = _read_json(config).get("added_tokens_decoder", {})
            added |= {int(index): token["content"] for index, token in decoder.items()}
        if names.is_file():
            added |= {int(index): content for content, index in _read_json(names).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{folder}: the added tokens in {config.name} or {names.name} are malformed") from err
    return added


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as err:
        raise CheckpointError(f"{path}: damaged ({err}); fetch it again") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{path}: cannot be read ({err})") from err
