"""Whether a value can fulfil two of several schemas: if not, exactly one of them is as good as any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


class Unions:
    """Tells schemas apart, by the type of the value or by a constant that one of its properties has to be.

    Args:
        definitions: What references point to, none of them to itself; may grow.
    """

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._kinds: dict[str, frozenset[str] | None] = {}
        self._tags: dict[str, dict[str, frozenset[str]]] = {}

    def are_disjoint(self, schemas: Sequence[Any]) -> bool:
        """Whether no value fulfils two of these narrowed schemas, as far as can be told."""
        return all(self._differ(one, other) for one, other in combinations(schemas, 2))

    def _differ(self, one: Any, other: Any) -> bool:
        kinds, others = self.kinds(one), self.kinds(other)
        if kinds is not None and others is not None and not kinds & others:
            return True
        tags, other_tags = self.tags(one), self.tags(other)
        return any(not tags[name] & other_tags[name] for name in tags if name in other_tags)

    def kinds(self, node: Any) -> frozenset[str] | None:
        """The types that a value of a schema may have; None for any."""
        if not isinstance(node, Mapping):
            return None
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in self._kinds:
                self._kinds[name] = self.kinds(self._definitions[name])
            return self._kinds[name]
        if "type" in node:
            names = [node["type"]] if isinstance(node["type"], str) else node["type"]
            return frozenset("number" if name == "integer" else name for name in names)
        for key in ("anyOf", "oneOf"):
            if key in node:
                parts = [self.kinds(part) for part in node[key]]
                return None if None in parts else frozenset[str]().union(*(part for part in parts if part is not None))
        return next((kinds for part in node.get("allOf", ()) if (kinds := self.kinds(part)) is not None), None)

    def tags(self, node: Any) -> dict[str, frozenset[str]]:
        """The constants that required properties of an object may be, as JSON."""
        if not isinstance(node, Mapping):
            return {}
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in self._tags:
                self._tags[name] = self.tags(self._definitions[name])
            return self._tags[name]
        found: dict[str, frozenset[str]] = {}
        for part in node.get("allOf", ()):
            found.update(self.tags(part))
        for name in node.get("required", ()):
            constants = self._constants(node.get("properties", {}).get(name))
            if constants is not None:
                found[name] = constants
        return found

    def _constants(self, node: Any) -> frozenset[str] | None:
        while isinstance(node, Mapping) and "$ref" in node:
            node = self._definitions[node["$ref"].rpartition("/")[2]]
        if not isinstance(node, Mapping) or not {"const", "enum"} & node.keys():
            return None
        values = [node["const"]] if "const" in node else node["enum"]
        return frozenset(json.dumps(value, sort_keys=True) for value in values)
