"""Answers in the form of a JSON schema."""

from __future__ import annotations

from typing import Any

from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.server.api import ApiError


def with_schema(request: Request, schema: Any, where: str) -> Request:
    """A request whose answer has the form of a schema; as it is, without one.

    Args:
        request: The request.
        schema: A JSON schema, `json` for any JSON object, or None.
        where: What the request's body calls it.

    Raises:
        ApiError: If no answer can be given in this form.
    """
    if schema is None:
        return request
    raise ApiError(400, f"{where} is not supported", param=where, code="unsupported_parameter")
