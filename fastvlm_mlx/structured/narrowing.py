"""Makes a schema one that a small model can fulfil: what it leaves open gets bounds; see `fastvlm_mlx.structured`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

from fastvlm_mlx.errors import SchemaError
from fastvlm_mlx.structured.keywords import (
    ANNOTATIONS,
    APPLICATORS,
    MOST_NUMBER,
    NUMBER_FORMATS,
    TYPE_OF,
    check_keywords,
)
from fastvlm_mlx.structured.references import References
from fastvlm_mlx.structured.unions import Unions

MOST_CHARACTERS = 512
"""The longest string where a schema sets no `maxLength`."""
MOST_ITEMS = 32
"""The most items and properties where a schema sets no number."""
DECIMALS = 6
"""The digits behind the point of a number."""
MOST_DECIMALS = 9
"""The same where the bounds that a schema sets have many."""
MOST_LEVELS = 5
"""How often a schema that refers to itself may be within itself."""
FREE_LEVELS = 3
"""The lists and objects within each other in a value without a schema."""
MOST_SCHEMAS = 10_000
"""The most schemas that a schema may be made of, each reference counted at each of its levels."""
KEY = "^[^\\x00-\\x1f]{1,64}$"
"""The keys of an object whose schema names none."""

Node: TypeAlias = dict[str, Any] | bool
"""A schema; False allows nothing."""


def narrowed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that allows part of what `schema` allows, within bounds, in the keywords that llguidance knows.

    Raises:
        SchemaError: If a keyword cannot be obeyed, a reference points nowhere, or nothing is allowed.
    """
    narrowing = _Narrowing(schema)
    node = narrowing.schema(schema, "schema at #", 0, ())
    if node is False:
        raise SchemaError("the schema allows no finite answer")
    assert isinstance(node, dict)
    return {**node, "$defs": narrowing.definitions} if narrowing.definitions else node


def any_object() -> dict[str, Any]:
    """The schema of any JSON object, within the bounds."""
    return narrowed({"type": "object"})


class _Narrowing:
    """Narrows one schema and what it refers to.

    Attributes:
        definitions: What references in the result point to.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.definitions: dict[str, Node] = {}
        self._references = References(root)
        self._unions = Unions(self.definitions)
        self._names: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def schema(self, node: Any, where: str, level: int, others: Sequence[str]) -> Node:
        """What a schema becomes.

        Args:
            node: The schema.
            where: Its place, for messages.
            level: How many references to recursive schemas lead to it.
            others: The properties that other schemas name for the same value, which it must not forbid.
        """
        self._count += 1
        if self._count > MOST_SCHEMAS:
            raise SchemaError(f"the schema has more than {MOST_SCHEMAS} parts")
        if isinstance(node, bool):
            return self._free(FREE_LEVELS) if node else False
        if not isinstance(node, Mapping):
            raise SchemaError(f"{where}: must be a schema, an object")
        check_keywords(node, where)
        meant = {key: value for key, value in node.items() if key not in ANNOTATIONS and not key.startswith("x-")}
        own = {key: value for key, value in meant.items() if key not in APPLICATORS}
        applied = {key: value for key, value in meant.items() if key in APPLICATORS}
        if not applied:
            return self._own(own, where, level, others) if own else self._free(FREE_LEVELS)
        parts = self._applied(applied, own, where, level, others)
        if own:
            names = self._references.names(applied, where)
            mine = self._own(own, where, level, list(dict.fromkeys([*others, *names])))
            parts = [*parts, mine] if next(iter(meant)) in APPLICATORS else [mine, *parts]
        if False in parts:
            return False
        return parts[0] if len(parts) == 1 else {"allOf": parts}

    def _applied(
        self, applied: dict[str, Any], own: dict[str, Any], where: str, level: int, others: Sequence[str]
    ) -> list[Node]:
        """What the schemas that hold for the value, too, become; all of them must hold."""
        every = [("$ref", value) for key, value in applied.items() if key == "$ref"]
        every += [(f"allOf/{place}", part) for place, part in enumerate(applied.get("allOf", ()))]
        every += [(key, applied[key]) for key in ("anyOf", "oneOf") if key in applied]
        parts: list[Node] = []
        for place, (key, value) in enumerate(every):
            rest = [self._as_schema(*each) for number, each in enumerate(every) if number != place]
            names = [*others, *self._references.names(own, where)]
            names += [name for each in rest for name in self._references.names(each, where)]
            elsewhere = list(dict.fromkeys(names))
            if key == "$ref":
                parts.append(self._reference(value, f"{where}/{key}", level, elsewhere))
            elif key in ("anyOf", "oneOf"):
                choices = [
                    self.schema(part, f"{where}/{key}/{number}", level, elsewhere) for number, part in enumerate(value)
                ]
                possible = [choice for choice in choices if choice is not False]
                disjoint = key == "oneOf" and self._unions.are_disjoint(possible)
                parts.append({"anyOf" if disjoint else key: possible} if possible else False)
            else:
                parts.append(self.schema(value, f"{where}/{key}", level, elsewhere))
        return parts

    @staticmethod
    def _as_schema(key: str, value: Any) -> Any:
        return {key: value} if key in APPLICATORS else value

    def _reference(self, reference: str, where: str, level: int, others: Sequence[str]) -> Node:
        target = self._references.target(reference, where)
        if self._references.is_recursive(reference, where):
            level += 1
            if level > MOST_LEVELS:
                return False
        key = (reference, level, *others)
        if key not in self._names:
            node = self.schema(target, f"schema at {reference}", level, others)
            self._names[key] = name = str(len(self._names))
            self.definitions[name] = node
        return self._defined(self._names[key])

    def _defined(self, name: str) -> Node:
        node = self.definitions[name]
        return {"$ref": f"#/$defs/{name}"} if isinstance(node, dict) else node

    def _free(self, levels: int) -> Node:
        """Any value, with so many lists and objects within each other."""
        name = f"any{levels}"
        if name not in self.definitions:
            scalars: Node = {"type": ["string", "number", "boolean", "null"], **_string({}), **_number({}, ["number"])}
            self.definitions[name] = scalars
            if levels:
                inner = self._free(levels - 1)
                array = {"type": "array", "items": inner, "maxItems": MOST_ITEMS}
                self.definitions[name] = {"anyOf": [scalars, array, {"type": "object", **_map(inner)}]}
        return self._defined(name)

    def _own(self, own: dict[str, Any], where: str, level: int, others: Sequence[str]) -> Node:
        """What the keywords of a schema become, but for those that bring in others."""
        if "enum" in own or "const" in own:
            kept = {key: value for key, value in own.items() if key in ("type", "enum", "const")}
            return kept if len(kept) == len(own) else self._constants(own, kept, where)
        types = own.get("type") or [kind for kind, keywords in TYPE_OF.items() if any(key in own for key in keywords)]
        types = [types] if isinstance(types, str) else list(types)
        kinds: list[Node] = []
        for kind in types:
            if kind == "object":
                kinds.append(self._object(own, where, level, others))
            elif kind == "array":
                kinds.append(self._array(own, where, level))
        scalars = [kind for kind in types if kind not in ("object", "array")]
        if scalars:
            node: dict[str, Any] = {"type": scalars if len(scalars) > 1 else scalars[0]}
            if "string" in scalars:
                node.update(_string(own))
            if "number" in scalars or "integer" in scalars:
                node.update(_number(own, scalars))
            kinds.append(node)
        possible = [kind for kind in kinds if kind is not False]
        if not possible:
            return False
        return possible[0] if len(possible) == 1 else {"anyOf": possible}

    @staticmethod
    def _constants(own: dict[str, Any], kept: dict[str, Any], where: str) -> Node:
        extra = next(key for key in own if key not in kept)
        raise SchemaError(f"{where}: the keyword {extra!r} is not supported beside 'enum' or 'const'; leave it out")

    def _object(self, own: dict[str, Any], where: str, level: int, others: Sequence[str]) -> Node:
        properties = {
            name: self.schema(part, f"{where}/properties/{name}", level, ())
            for name, part in own.get("properties", {}).items()
        }
        patterns = {
            name: self.schema(part, f"{where}/patternProperties/{name}", level, ())
            for name, part in own.get("patternProperties", {}).items()
        }
        required = list(dict.fromkeys(own.get("required", ())))
        limits: dict[str, int] = {key: own[key] for key in ("minProperties", "maxProperties") if key in own}
        given = own.get("additionalProperties", True)
        is_open = given is True or (isinstance(given, Mapping) and not set(given) - ANNOTATIONS)
        named = dict.fromkeys([*properties, *required, *others])
        if is_open and (patterns or len(named) >= max(1, limits.get("minProperties", 0))):
            additional: Node = False
        else:
            value = True if is_open else given
            additional = self.schema(value, f"{where}/additionalProperties", level, ())
        if is_open and not patterns and additional is False:
            for name in others:
                properties.setdefault(name, True)
            for name in required:
                if name not in properties:
                    properties[name] = self._free(FREE_LEVELS)
        if any(properties.get(name) is False for name in required):
            return False
        if additional is not False and not (named or patterns):
            return {"type": "object", **_map(additional, limits)}
        node: dict[str, Any] = {"type": "object", "properties": properties, "patternProperties": patterns, **limits}
        if set(properties) <= set(required) and (patterns or additional is not False):
            node.setdefault("maxProperties", max(MOST_ITEMS, limits.get("minProperties", 0)) + len(required))
        return {**node, "additionalProperties": additional, "required": required}

    def _array(self, own: dict[str, Any], where: str, level: int) -> Node:
        first, rest = own.get("prefixItems", []), own.get("items", True)
        if isinstance(rest, (list, tuple)):  # as drafts before 2020 had it
            first, rest = rest, own.get("additionalItems", True)
        prefix = [self.schema(part, f"{where}/prefixItems/{place}", level, ()) for place, part in enumerate(first)]
        items = False if prefix and rest is True else self.schema(rest, f"{where}/items", level, ())
        least = own.get("minItems", 0)
        if False in prefix:
            prefix, items = prefix[: prefix.index(False)], False
        if items is False and least > len(prefix):
            return False
        most = len(prefix) if items is False else max(MOST_ITEMS, least, len(prefix))
        node = {"type": "array", "items": items, "minItems": least, "maxItems": min(most, own.get("maxItems", most))}
        if items is not False and "maxItems" in own:
            node["maxItems"] = own["maxItems"]
        return {**node, "prefixItems": prefix} if prefix else node


def _map(value: Node, limits: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The keywords of an object with any keys and values of one schema."""
    limits = limits or {}
    most = max(MOST_ITEMS, limits.get("minProperties", 0))
    return {"patternProperties": {KEY: value}, "additionalProperties": False, "maxProperties": most, **limits}


def _string(own: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords about strings, with a length."""
    kept = {key: own[key] for key in ("minLength", "maxLength", "pattern") if key in own}
    if own.get("format", "int32") not in NUMBER_FORMATS:
        kept["format"] = own["format"]
    return {"maxLength": max(MOST_CHARACTERS, own.get("minLength", 0)), **kept}


def _number(own: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """The keywords about numbers, with a least and a largest one and a number of digits."""
    kept = {key: own[key] for key in TYPE_OF["number"] if key in own}
    is_whole = "number" not in types
    lowest, highest = NUMBER_FORMATS.get(own.get("format", "")) or (-MOST_NUMBER, MOST_NUMBER)
    bounds = [value for key, value in kept.items() if key != "multipleOf"]
    if "exclusiveMinimum" not in kept:
        kept["minimum"] = max(kept.get("minimum", lowest), lowest)
    if "exclusiveMaximum" not in kept:
        kept["maximum"] = min(kept.get("maximum", highest), highest)
    if not is_whole and "multipleOf" not in kept:
        decimals = max([DECIMALS, *map(_decimals, bounds)])
        if decimals <= MOST_DECIMALS:
            kept["multipleOf"] = float(f"1e-{decimals}")
    return kept


def _decimals(value: float) -> int:
    """The digits behind the point of a number."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
