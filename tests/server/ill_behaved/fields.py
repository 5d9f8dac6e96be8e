"""Requests with something wrong in one place: every key of every API with every kind of value."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from fastvlm_mlx.server.app import APIS
from fastvlm_mlx.server.openapi import describe
from fastvlm_mlx.server.settings import Settings

DESCRIPTION = describe(Settings(), [api.path for api in APIS], "demo")
SCHEMAS = DESCRIPTION["components"]["schemas"]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e-300, 1e308, 2**31, 2**64, 10**400),
    *("", " ", "x", "auto", "\0", "\x1b[31m", "é🙂" * 500, "<|im_end|>", "data:", "file:///etc/passwd", "../..", "1"),
    *([], [None], [[]], [{}], ["x"] * 1000, [0] * 20, {}, {"": None}, {"type": "text"}, {"type": []}, {"x": {"y": 1}}),
    *({"type": "image_url", "image_url": 1}, [{"type": "text", "text": 1}], [{"role": "user", "content": [[]]}]),
)

Path = tuple[str | int, ...]


def example(path: str) -> dict[str, Any]:
    """A request that is answered."""
    return copy.deepcopy(_content(path)["example"])


def places(path: str) -> list[Path]:
    """Every place of an API's requests: those of the example, and those that the description names besides."""
    name = _content(path)["schema"]["$ref"].rpartition("/")[2]
    return list(dict.fromkeys((*_within(example(path)), *_named(SCHEMAS[name]))))


def changed(body: dict[str, Any], place: Path, value: Any) -> dict[str, Any]:
    """A request with another value in one place; what is on the way to it is made."""
    node: Any = body
    for step in place[:-1]:
        if isinstance(node, dict) and not isinstance(node.get(step), (dict, list)):
            node[step] = {}
        node = node[step]
    node[place[-1]] = value
    return body


def requests(path: str) -> Iterator[tuple[Path, Any]]:
    """Every place with every value."""
    return ((place, value) for place in places(path) for value in VALUES)


def encode(body: Any) -> bytes:
    """JSON, with what no encoder writes: NaN stays, and halves of characters."""
    return json.dumps(body).encode()


def _content(path: str) -> dict[str, Any]:
    content: dict[str, Any] = DESCRIPTION["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return content


def _within(value: Any, above: Path = ()) -> Iterator[Path]:
    """The places in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*above, key)
        yield from _within(each, (*above, key))


def _named(schema: Any, above: Path = ()) -> Iterator[Path]:
    """The keys that a schema names, those of its objects too."""
    for name, inner in schema.get("properties", {}).items():
        yield (*above, name)
        for each in (inner, *inner.get("anyOf", ())):
            yield from _named(each, (*above, name))
