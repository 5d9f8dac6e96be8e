"""Which tokens may follow, by a schema and the tokens so far. Shapes: V vocabulary."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.structured.schemas import Schema, library

MOST_GRAMMARS = 64
"""The schemas whose grammars are kept for a processor."""


class Grammars:
    """The grammars of a processor's vocabulary, each built once. Several threads may use them.

    Args:
        processor: From `load`.
    """

    def __init__(self, processor: FastVLMProcessor) -> None:
        self._size = processor.vocab_size
        self._ends = tuple(processor.eos_token_ids)
        self._lock = threading.Lock()
        self._known: OrderedDict[Schema, Matcher] = OrderedDict()
        vocabulary = _Vocabulary(processor.tokenizer, self._ends)
        self._tokenizer = library().LLTokenizer(vocabulary, eos_token=list(self._ends))

    @classmethod
    def of(cls, processor: FastVLMProcessor) -> Grammars:
        """Those of a processor, which are built when they are first asked for: half a second for Qwen2's vocabulary."""
        with _LOCK:
            if processor not in _GRAMMARS:
                _GRAMMARS[processor] = cls(processor)
            return _GRAMMARS[processor]

    def start(self, schema: Schema) -> Matcher:
        """What follows a schema from its beginning.

        Raises:
            SchemaError: If the schema is too large for a grammar.
        """
        with self._lock:
            if schema not in self._known:
                matcher = library().LLMatcher(self._tokenizer, schema.grammar, log_level=0)
                self._known[schema] = Matcher(matcher, self._ends, self._size)
                if len(self._known) > MOST_GRAMMARS:
                    self._known.popitem(last=False)
            self._known.move_to_end(schema)
            return self._known[schema].copy()


_LOCK = threading.Lock()
_GRAMMARS: weakref.WeakKeyDictionary[FastVLMProcessor, Grammars] = weakref.WeakKeyDictionary()


class Matcher:
    """Follows the tokens of one answer.

    Args:
        matcher: llguidance's.
        ends: The ids of the tokens that may end an answer.
        size: V.

    Attributes:
        allowed: (V,), the tokens that may follow; an end token only where the answer is complete.
        complete: Whether nothing may follow but an end token.

    Raises:
        SchemaError: If the grammar is too complex.
    """

    def __init__(self, matcher: Any, ends: tuple[int, ...], size: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self.allowed: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        self.complete = False
        self._look()

    def copy(self) -> Matcher:
        """Another one at the same place."""
        copy = object.__new__(Matcher)
        copy._matcher, copy._ends = self._matcher.deep_copy(), self._ends
        copy.allowed, copy.complete = self.allowed, self.complete
        return copy

    def advance(self, token: int) -> None:
        """Goes on behind a token that was allowed; behind the end, nothing changes.

        Raises:
            SchemaError: If the token was not allowed, or the grammar is too complex.
        """
        if not self.complete:
            self._matcher.consume_token(token)
            self._look()

    def _look(self) -> None:
        matcher = self._matcher
        stopped = matcher.is_stopped()
        allowed = np.zeros_like(self.allowed)
        if not stopped:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            allowed[: len(bits)] = bits[: len(allowed)]
        if matcher.is_error() or not (stopped or allowed.any()):
            reason = printable(matcher.get_error().partition("\n")[0], 200)
            raise SchemaError(f"the schema is too complex to be followed ({reason}); simplify it")
        self.complete = stopped or matcher.is_stopped()
        if self.complete:
            allowed[:] = False
            allowed[list(self._ends)] = True
        self.allowed = allowed


class _Vocabulary:
    """A vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.tokens, self.special_token_ids = tokenizer.vocabulary()
        self.bos_token_id = None
        self.eos_token_id = ends[0]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
