"""JSON as servers send it: whole, as server-sent events, or line by line."""

import json
from typing import Any


def compact(value: Any) -> bytes:
    """A JSON value without spaces, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """A JSON value as one server-sent event."""
    return b"data: " + compact(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """A JSON value as one server-sent event that has a name."""
    return b"event: " + name.encode() + b"\n" + event(value)


def line(value: Any) -> bytes:
    """A JSON value as one line."""
    return compact(value) + b"\n"
