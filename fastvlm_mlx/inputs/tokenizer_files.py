"""The tokenizers library's tokenizer, from the files of a checkpoint."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.characters import WORDS
from fastvlm_mlx.schema import integer, mapping, read_object, read_small_file, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import tokenizers

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

MOST_TOKENS = 2**20
"""The most tokens of a vocabulary whose embedding is not known; Qwen2's has 151,646."""


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
        with library_errors(path):
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
    with library_errors(folder):
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
def library_errors(path: Path) -> Iterator[None]:
    """Turns every error of the tokenizers library into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as err:  # it raises nothing narrower than Exception, and its panics are not even that
        if not (isinstance(err, Exception) or type(err).__name__ == "PanicException"):
            raise
        raise CheckpointError(f"{printable(path)}: not a tokenizer ({printable(err)}); fetch it again") from err


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_alphabet()
BYTES_OF_NAMES = {ord(char): byte for char, byte in BYTES.items()}


def _from_vocabulary(folder: Path, rows: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    path = folder / "vocab.json"
    vocab = read_object(path) or {}
    check_ids(vocab, rows, printable(path))
    merges = _read_merges(folder / "merges.txt", vocab)
    with library_errors(path):
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check_ids(vocabulary: Mapping[str, Any], rows: int, label: str) -> None:
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
