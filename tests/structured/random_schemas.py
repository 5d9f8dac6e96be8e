"""Random schemas of every kind that can be followed."""

from typing import Any

import numpy as np

NAMES = ("a", "b", "name", "count of", "größe", 'say "hi"', "x\ny", "", "z/~")


def random_schema(rng: np.random.Generator, depth: int = 3) -> dict[str, Any]:
    """A schema with `$defs` that it may refer to, and that may refer to themselves."""
    definitions = {name: _schema(rng, depth - 1) for name in ("left", "right")}
    return {**_schema(rng, depth), "$defs": definitions, "title": "random"}


def _schema(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    kinds = ["string", "number", "integer", "boolean", "null", "enum", "free"]
    kinds += ["object", "object", "array", "anyOf", "map", "tuple", "allOf", "oneOf", "several", "$ref"] * (depth > 0)
    kind = str(rng.choice(kinds))
    return _MAKERS[kind](rng, depth) if kind in _MAKERS else {"type": kind}


def _string(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.6:
        schema["minLength"] = int(rng.integers(0, 5))
        schema["maxLength"] = schema["minLength"] + int(rng.integers(0, 12))
    elif rng.random() < 0.4:
        schema["pattern"] = str(
            rng.choice(["^[a-z]{2,6}$", r"^\d{4}-\d{2}$", "^(red|green|blue)s?$", "^é[^a-z]{1,3}$"])
        )
    elif rng.random() < 0.4:
        schema["format"] = str(rng.choice(["date", "time", "date-time", "email", "uuid", "ipv4"]))
    return schema


def _number(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": str(rng.choice(["number", "integer"]))}
    low = float(rng.choice([-1e6, -2.5, 0, 0.1, 7]))
    if rng.random() < 0.5:
        schema[str(rng.choice(["minimum", "exclusiveMinimum"]))] = low
    if rng.random() < 0.5:
        schema[str(rng.choice(["maximum", "exclusiveMaximum"]))] = low + float(rng.choice([2.0, 10, 12345.5]))
    if schema["type"] == "integer" and rng.random() < 0.3:
        schema["multipleOf"] = int(rng.choice([1, 2]))
    return schema


def _enum(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    values = ["red", "grün", 'q"q', "tab\t", "\u0001", "", 3, -1.5, None, True, [1, {"k": "v"}], {"a": []}, 10**15]
    chosen = [values[place] for place in rng.choice(len(values), rng.integers(1, 4), replace=False)]
    return {"const": chosen[0]} if rng.random() < 0.3 else {"enum": chosen}


def _object(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    keys = [NAMES[place] for place in rng.choice(len(NAMES), rng.integers(1, 5), replace=False)]
    schema: dict[str, Any] = {"properties": {key: _schema(rng, depth - 1) for key in keys}}
    schema["required"] = [key for key in keys if rng.random() < 0.7]
    if rng.random() < 0.8:
        schema["type"] = "object"
    if rng.random() < 0.3:
        schema["additionalProperties"] = [True, False, {"type": "integer"}][int(rng.integers(3))]
    return schema


def _map(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "additionalProperties": _schema(rng, depth - 1)}
    if rng.random() < 0.5:
        schema["maxProperties"] = int(rng.integers(1, 4))
    return schema


def _array(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    schema = {"type": "array", "items": _schema(rng, depth - 1)}
    if rng.random() < 0.7:
        schema["minItems"] = int(rng.integers(0, 3))
        schema["maxItems"] = int(schema["minItems"] + rng.integers(0, 3))
    return schema


def _tuple(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    parts = [_schema(rng, depth - 1) for _ in range(rng.integers(1, 3))]
    return {"type": "array", "prefixItems": parts, "minItems": len(parts), "items": False}


def _any_of(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.integers(1, 4))]}


def _all_of(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    """Objects that share no property, so that both can hold."""
    keys = list(rng.permutation(NAMES))
    parts = []
    for mine in (keys[:2], keys[2:4]):
        properties = {str(key): _schema(rng, depth - 1) for key in mine}
        parts.append({"type": "object", "properties": properties, "required": [str(mine[0])]})
    if rng.random() < 0.5:
        return {**parts[0], "anyOf": [parts[1], {"required": [str(keys[1])]}]}
    return {"allOf": parts}


def _one_of(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    """Parts of different types, or objects with a constant each."""
    if rng.random() < 0.3:
        return {"oneOf": [{"type": "null"}, _string(rng, depth), _map(rng, depth)]}
    parts = [_object(rng, depth) for _ in range(rng.integers(1, 4))]
    for number, part in enumerate(parts):
        part["properties"]["kind"] = {"const": f"kind {number}"}
        part["required"].append("kind")
    return {"oneOf": parts}


def _several(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"type": ["string", "null", "integer"], "maxLength": 5, "minimum": 0}


def _reference(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    """To a definition; beside another choice, so that there is a finite answer."""
    return {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{rng.choice(['left', 'right'])}"}]}


_MAKERS: dict[str, Any] = {
    "string": _string,
    "number": _number,
    "integer": _number,
    "enum": _enum,
    "free": lambda *_: {},
    "object": _object,
    "map": _map,
    "array": _array,
    "tuple": _tuple,
    "anyOf": _any_of,
    "allOf": _all_of,
    "oneOf": _one_of,
    "several": _several,
    "$ref": _reference,
}
