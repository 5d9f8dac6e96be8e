"""Answers that a schema allows, byte by byte, without a model."""

import functools
from typing import Any

import numpy as np

from fastvlm_mlx.structured.grammar import Matcher
from fastvlm_mlx.structured.schemas import JsonSchema, Schema, library

END = 256
_FAVOURED = b'"]}:,0123456789abc'


class Bytes:
    """A vocabulary of the 256 bytes and an end token."""

    is_tokenizer_wrapper = True
    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@functools.cache
def tokenizer() -> Any:
    return library().LLTokenizer(Bytes(), eos_token=[END])


def matcher(schema: JsonSchema | Schema) -> Matcher:
    """Follows the bytes of an answer."""
    followed = Schema.of(schema)
    assert followed is not None
    return Matcher(library().LLMatcher(tokenizer(), followed.grammar, log_level=0), (END,), END + 1)


def random_answer(schema: JsonSchema | Schema, rng: np.random.Generator, most: int = 20_000) -> str | None:
    """A text that a schema allows, drawn byte by byte, with more quotes and brackets than by chance.

    None if it has not ended after `most` bytes.
    """
    follower, answer = matcher(schema), bytearray()
    while not follower.complete:
        allowed = np.flatnonzero(follower.allowed)
        preferred = [byte for byte in allowed if byte < END and byte in _FAVOURED] if rng.random() < 0.7 else []
        byte = int(rng.choice(preferred or allowed))
        if byte == END:
            break
        if len(answer) == most:
            return None
        answer.append(byte)
        follower.advance(byte)
    return answer.decode()


def is_allowed(schema: JsonSchema | Schema, text: str) -> bool:
    """Whether an answer may be this text."""
    follower = matcher(schema)
    for byte in text.encode():
        if not follower.allowed[byte]:
            return False
        follower.advance(byte)
    return follower.complete or bool(follower.allowed[END])
