"""Which tokens may follow."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.structured import grammar as module
from fastvlm_mlx.structured.grammar import Grammars, Matcher
from fastvlm_mlx.structured.schemas import Schema, library


@pytest.fixture
def grammars(loaded):
    return Grammars.of(loaded[1])


def test_rows_beyond_the_vocabulary_are_never_allowed(loaded, grammars):
    """The embedding of the golden checkpoint has 384 rows, its tokenizer fewer tokens."""
    tokens, _ = loaded[1].tokenizer.vocabulary()
    assert len(tokens) < loaded[1].vocab_size
    matcher = grammars.start(Schema.of({"type": "string"}))
    for token in loaded[1].tokenizer.encode('"abc'):
        assert matcher.allowed.shape == (loaded[1].vocab_size,)
        assert not matcher.allowed[len(tokens) :].any()
        matcher.advance(token)


def test_special_tokens_are_allowed_only_where_the_answer_may_end(loaded, grammars):
    tokenizer, ends = loaded[1].tokenizer, list(loaded[1].eos_token_ids)
    special = tokenizer.vocabulary()[1]
    assert set(ends) < set(special)
    matcher = grammars.start(Schema.of({"type": "integer", "maximum": 99}))
    assert not matcher.allowed[special].any()
    matcher.advance(tokenizer.encode("5")[0])
    assert set(np.flatnonzero(matcher.allowed[special])) == {special.index(end) for end in ends}
    matcher.advance(tokenizer.encode("5")[0])
    assert matcher.complete
    assert np.flatnonzero(matcher.allowed).tolist() == sorted(ends)
    matcher.advance(ends[0])
    assert matcher.complete


def test_an_answer_that_ends_is_complete(loaded, grammars):
    matcher = grammars.start(Schema.of({"type": "integer"}))
    matcher.advance(loaded[1].tokenizer.encode("5")[0])
    assert not matcher.complete
    matcher.advance(loaded[1].eos_token_ids[0])
    assert matcher.complete


def test_text_that_looks_like_markup_is_text(loaded, grammars):
    """A constant may spell a special token; it is written letter by letter."""
    tokenizer = loaded[1].tokenizer
    special = tokenizer.vocabulary()[1]
    matcher = grammars.start(Schema.of({"const": "<|im_end|>"}))
    for token in tokenizer.encode('"<|im_end|>"'):
        assert matcher.allowed[token]
        assert not matcher.allowed[special].any()
        matcher.advance(token)
    assert matcher.complete


def test_a_copy_goes_its_own_way(grammars, loaded):
    schema = Schema.of({"enum": ["ab", "ac"]})
    first, second = grammars.start(schema), grammars.start(schema)
    before = second.allowed.copy()
    for token in loaded[1].tokenizer.encode('"ab"'):
        first.advance(token)
    assert first.complete
    assert not second.complete
    np.testing.assert_array_equal(second.allowed, before)


def test_a_grammar_is_built_once(loaded, monkeypatch):
    grammars, built = Grammars(loaded[1]), []
    real = library().LLMatcher

    class Counting:
        @staticmethod
        def LLMatcher(*arguments, **options):
            built.append(arguments[1])
            return real(*arguments, **options)

    schemas = [Schema.of({"const": number}) for number in range(4)]
    monkeypatch.setattr(module, "library", lambda: Counting)
    monkeypatch.setattr(module, "MOST_GRAMMARS", 3)
    for number in (0, 0, 1, 2, 0, 3, 0, 1):
        grammars.start(schemas[number])
    assert [schemas[number].grammar for number in (0, 1, 2, 3, 1)] == built, "the least recently used goes first"
    assert Grammars.of(loaded[1]) is Grammars.of(loaded[1])


def test_a_grammar_that_is_too_complex_is_refused(loaded, grammars):
    limits = library().LLParserLimits(initial_lexer_fuel=10)
    schema = Schema.of({"type": "string", "pattern": "^(a|b|c){3,400}$"})
    matcher = library().LLMatcher(grammars._tokenizer, schema.grammar, log_level=0, limits=limits)
    with pytest.raises(SchemaError, match=r"the schema is too complex to be followed \(.+\); simplify it"):
        Matcher(matcher, (1,), 384)


def test_a_vocabulary_is_the_bytes_of_each_token(loaded):
    for tokenizer in (loaded[1].tokenizer, Tokenizer(Path("tests/tokenizer/qwen2").absolute())):
        tokens, special = tokenizer.vocabulary()
        for index in [*range(0, len(tokens), 97), *special]:
            assert tokens[index] == tokenizer.token_bytes(index, skip_special_tokens=False)
