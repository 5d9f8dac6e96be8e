"""The references of a schema to parts of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.schema import shown
from fastvlm_mlx.structured.keywords import ANNOTATIONS, APPLICATORS


class References:
    """Finds what the references of a schema stand for.

    Args:
        root: The whole schema.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._recursive: dict[str, bool] = {}

    def target(self, reference: str, where: str) -> Any:
        """The schema that a reference such as `#/$defs/animal` points to.

        Raises:
            SchemaError: If it points to another document, or to nothing.
        """
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaError(f"{where}: {shown(reference)} is no part of this schema (#/…); nothing is fetched")
        node: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and name in node:
                node = node[name]
            elif isinstance(node, (list, tuple)) and name.isdecimal() and len(name) < 7 and int(name) < len(node):
                node = node[int(name)]
            else:
                raise SchemaError(f"{where}: there is no {shown(reference)} in this schema")
        return node

    def is_recursive(self, reference: str, where: str) -> bool:
        """Whether what a reference stands for refers to itself, at whatever distance."""
        if reference not in self._recursive:
            seen: set[str] = set()
            new = set(_inside(self.target(reference, where)))
            while new - seen:
                seen |= new
                new = {inner for each in new for inner in _inside(self.target(each, where))}
            self._recursive[reference] = reference in seen
        return self._recursive[reference]

    def names(self, node: Any, where: str, seen: frozenset[str] = frozenset()) -> list[str]:
        """The properties that a schema names for its value, in their order, wherever it does."""
        if not isinstance(node, Mapping):
            return []
        properties, required = node.get("properties"), node.get("required")
        names = list(properties) if isinstance(properties, Mapping) else []
        names += [name for name in required if isinstance(name, str)] if isinstance(required, (list, tuple)) else []
        for key in APPLICATORS:
            value = node.get(key)
            if isinstance(value, str) and value not in seen:
                names += self.names(self.target(value, where), where, seen | {value})
            elif isinstance(value, (list, tuple)):
                names += [name for part in value for name in self.names(part, where, seen)]
        return list(dict.fromkeys(names))


def _inside(node: Any) -> Iterator[str]:
    """The references in a schema and its parts."""
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _inside(part)
    elif isinstance(node, Mapping):
        for key, part in node.items():
            if key == "$ref" and isinstance(part, str):
                yield part
            elif key not in ANNOTATIONS and key not in ("enum", "const"):
                yield from _inside(part)
