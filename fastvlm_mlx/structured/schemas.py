"""Schemas as users give them, checked and made ready for grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.formatting import printable, readable_bytes
from fastvlm_mlx.schema import is_deeper, shown
from fastvlm_mlx.structured.narrowing import any_object, narrowed

LARGEST = 500_000
"""The most bytes of a schema."""
MOST_LEVELS = 64
"""The most objects and lists within each other in a schema."""


@runtime_checkable
class HasSchema(Protocol):
    """A class that knows its JSON schema, as pydantic's models do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """The schema."""


@dataclass(frozen=True)
class Schema:
    """A schema that answers can be made to follow; make one with `Schema.of`.

    Attributes:
        text: The narrowed schema, as JSON.
        grammar: What llguidance makes of it.
    """

    text: str
    grammar: str = field(repr=False, compare=False)

    @classmethod
    def of(cls, schema: JsonSchema | Schema | None) -> Schema | None:
        """What an answer has to follow; None for nothing.

        Args:
            schema: A JSON schema, a class with `model_json_schema`, or `"json"` or True for any object; None or False
                for no schema.

        Raises:
            SchemaError: If it is none of these, it uses what cannot be ensured, nothing fulfils it, or llguidance is
                missing.
        """
        if schema is None or schema is False or isinstance(schema, Schema):
            return schema or None
        matcher = library().LLMatcher
        text = json.dumps(_narrowed(schema), ensure_ascii=False)
        grammar = matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        failed, messages = matcher.validate_grammar_with_warnings(grammar)
        if failed:
            raise SchemaError(f"the schema cannot be used: {_reason(messages[0])}")
        return cls(text, grammar)


JsonSchema: TypeAlias = Mapping[str, Any] | type[HasSchema] | Literal["json"] | bool
"""What a user may give as a schema."""


def library() -> Any:
    """The module `llguidance`.

    Raises:
        SchemaError: If it is not installed.
    """
    try:
        import llguidance
    except ImportError as err:
        raise SchemaError(
            "answers that follow a schema need llguidance; install it with: pip install 'fastvlm-mlx[structured]'"
        ) from err
    return llguidance


def _reason(message: str) -> str:
    """What llguidance says, in one line."""
    if "oneOf" in message:
        return "the parts of a oneOf may overlap; give each another constant in a required property, or use anyOf"
    return printable(" ".join(message.split()), 300)


def _narrowed(schema: object) -> dict[str, Any]:
    if schema is True or (isinstance(schema, str) and schema == "json"):
        return any_object()
    if isinstance(schema, HasSchema):
        schema = schema.model_json_schema()
    if not isinstance(schema, Mapping):
        raise SchemaError(
            f"schema must be a JSON schema as a dict, a class with model_json_schema, or 'json', not {shown(schema)}"
        )
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except RecursionError:
        size, levels = 0, False
    except (TypeError, ValueError) as err:
        raise SchemaError(f"the schema is no JSON: {printable(err, 200)}") from err
    else:
        levels = not is_deeper(schema, MOST_LEVELS)
    if not levels:
        raise SchemaError(f"the schema has more than {MOST_LEVELS} levels of objects and lists")
    if size > LARGEST:
        raise SchemaError(f"the schema has {readable_bytes(size)}, expected at most {readable_bytes(LARGEST)}")
    return narrowed(schema)
