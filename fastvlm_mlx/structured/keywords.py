"""The keywords of JSON schemas: which are obeyed, which mean nothing for an answer, and what their values must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.schema import shown

MOST_NUMBER = 2**53 - 1
"""Numbers up to this one are exact in every JSON library; the grammar's are no larger, either."""

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
"""The formats of strings that llguidance ensures."""

NUMBER_FORMATS = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-MOST_NUMBER, MOST_NUMBER),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, MOST_NUMBER),
    "float": None,
    "double": None,
}
"""OpenAPI's formats of numbers, with the range of the whole ones."""

ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default example examples deprecated readOnly writeOnly "
    "contentEncoding contentMediaType contentSchema nullable discriminator externalDocs xml".split()
)
"""Keywords that do not change which answers are allowed, or are read where a `$ref` points to them.

`nullable` only allows more.
"""

APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf")
"""Keywords that bring in other schemas for the same value."""

TYPE_OF = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""The keywords that are about one type."""

OBEYED = frozenset(("type", "enum", "const", *APPLICATORS, *(name for names in TYPE_OF.values() for name in names)))

REFUSED = frozenset(
    "not if then else dependentSchemas dependentRequired dependencies contains minContains maxContains propertyNames "
    "unevaluatedItems unevaluatedProperties $anchor $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor "
    "$vocabulary id".split()
)
"""Keywords of JSON schemas that cannot be ensured."""


def check_keywords(node: Mapping[Any, Any], where: str) -> None:
    """Checks the keywords of one schema and the kinds of their values.

    Raises:
        SchemaError: If one is not supported, unknown or of the wrong kind; the message begins with `where`.
    """
    for key, value in node.items():
        if not isinstance(key, str):
            raise SchemaError(f"{where}: a keyword must be a text, not {shown(key)}")
        if key in ANNOTATIONS or key.startswith("x-"):
            continue
        if key in REFUSED or (key == "uniqueItems" and value is not False):
            raise SchemaError(f"{where}: the keyword {shown(key)} is not supported; leave it out")
        if key not in OBEYED:
            raise SchemaError(f"{where}: unknown keyword {shown(key)}; is it misspelt?")
        _check(key, value, f"{where}/{key}")


def _check(key: str, value: Any, where: str) -> None:
    for keys, is_right, expected in _KINDS:
        if key in keys and not is_right(value):
            raise SchemaError(f"{where}: must be {expected}, not {shown(value)}")
    if key == "enum" or key == "const":
        _check_constant(value, where)
    if key == "format" and value not in FORMATS and value not in NUMBER_FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise SchemaError(f"{where}: the format {shown(value)} is not supported; leave it out or use one of {known}")


def _check_constant(value: Any, where: str) -> None:
    """Checks that a value can be written to the last digit."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise SchemaError(f"{where}: the keys of objects must be texts, not {shown(name)}")
            _check_constant(part, where)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_constant(part, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_number(value):
        raise SchemaError(f"{where}: {_NUMBER}, not {shown(value)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**6


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(isinstance(part, kind) for part in value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, (Mapping, bool))


def _is_type(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_list_of(str)(names) and bool(names) and all(name in TYPES for name in names)


def _are_schemas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_schema, value))


_NUMBER = "a number from -(2**53 - 1) to 2**53 - 1"
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("type",), _is_type, f"one or several of {', '.join(TYPES)}"),
    (("enum",), lambda value: isinstance(value, (list, tuple)) and bool(value), "a list that is not empty"),
    (("allOf", "anyOf", "oneOf"), _are_schemas, "a list of schemas"),
    (("prefixItems",), lambda value: value == [] or _are_schemas(value), "a list of schemas"),
    (("items",), lambda value: _is_schema(value) or value == [] or _are_schemas(value), "a schema"),
    (("additionalProperties", "additionalItems"), _is_schema, "a schema"),
    (("properties", "patternProperties"), lambda value: isinstance(value, Mapping), "an object of schemas"),
    (("required",), _is_list_of(str), "a list of names"),
    (("$ref", "pattern", "format"), lambda value: isinstance(value, str), "a text"),
    (
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _is_count,
        "a whole number from 0 to 1000000",
    ),
    (("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number, _NUMBER),
    (("multipleOf",), lambda value: _is_number(value) and value > 0, "a number above 0 and at most 2**53 - 1"),
)
