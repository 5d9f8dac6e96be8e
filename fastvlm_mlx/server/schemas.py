"""Answers in the form of a JSON schema."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.fields import Fields

ANY_OBJECT = "json"
_TYPES = ("text", "json_object", "json_schema")


def with_schema(request: Request, schema: Any, where: str) -> Request:
    """A request whose answer has the form of a schema; as it is, without one.

    Args:
        request: The request.
        schema: A JSON schema, `ANY_OBJECT`, or None.
        where: What the request's body calls it.

    Raises:
        ApiError: If no answer can be given in this form.
    """
    if schema is None:
        return request
    try:
        return replace(request, schema=schema)
    except SchemaError as err:
        raise ApiError(400, f"{where}: {err}", param=where, code="invalid_schema") from err


def read_format(form: Fields | None, *, nested: str = "") -> tuple[str, Any]:
    """What OpenAI calls the format of a text: its type, and the schema that it means.

    Args:
        form: The object that describes it; None for text.
        nested: The key of the object that has the schema; empty if it is in `form` itself.

    Raises:
        ApiError: If it is of an unknown type or has no schema.
    """
    kind = form.text("type", among=_TYPES) if form is not None else "text"
    if form is None or kind == "text":
        return "text", None
    if kind is None:
        raise form.wrong("type", f"one of {', '.join(_TYPES)}")
    if kind == "json_object":
        return kind, read_schema(form) if "schema" in form else ANY_OBJECT  # llama.cpp's clients send one
    inner = form.object(nested) if nested else form
    if inner is None:
        raise form.wrong(nested, "an object with a schema")
    inner.flag("strict")  # it always is
    inner.text("name")
    inner.text("description")
    return kind, read_schema(inner)


def read_schema(form: Fields) -> dict[str, Any]:
    """The schema of an object that has one.

    Raises:
        ApiError: If it has none.
    """
    schema = form.value("schema")
    if not isinstance(schema, dict):
        raise form.wrong("schema", "a JSON schema")
    return schema
