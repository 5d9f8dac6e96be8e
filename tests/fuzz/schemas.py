"""JSON schemas that answers have to follow."""

import copy
import importlib.util
import json
from random import Random
from typing import Any

import jsonschema
import numpy as np

from fastvlm_mlx.structured.schemas import Schema
from tests.fuzz import damage
from tests.fuzz.room import Room
from tests.fuzz.subject import Wrong, command
from tests.structured.answers import random_answer
from tests.structured.random_schemas import random_schema

_KEYWORDS = (
    *("not", "if", "contains", "uniqueItems", "format", "pattern", "$ref", "oneOf", "allOf", "minItems", "maxLength"),
    *("minProperties", "multipleOf", "enum", "const", "additionalProperties", "prefixItems", "type", "typ", "$defs"),
)
_VALUES: tuple[Any, ...] = (
    *("#", "#/$defs/left", "#/nowhere", "https://example.org/x", "date", "uuid", "^a+$", "[", "(?=a)", "^(a|b)*$"),
    *(
        [{}, {}],
        [{"type": "string"}, {"type": "number"}],
        [{"properties": {"a": {}}}],
        0,
        1,
        3,
        2**53,
        0.1,
        True,
        False,
    ),
    *({}, {"type": "string"}, ["a", "b"], [1, 2.5, None], "object", ["string", "null"]),
)


def _schema(random: Random) -> Any:
    """A schema, most often with keywords and values that do not fit."""
    schema: Any = random_schema(np.random.default_rng(random.randrange(2**32)), 2)
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        if not isinstance(schema, (dict, list)):
            break
        if random.random() < 0.5:
            schema = damage.some_value(random, schema)
        else:
            places = [schema, *(part for part in schema.values() if isinstance(part, dict))]
            random.choice(places)[random.choice(_KEYWORDS)] = copy.deepcopy(random.choice(_VALUES))
    return schema


def schema(random: Random, room: Room) -> None:
    """A schema: whatever it allows a model to answer is JSON of it."""
    if importlib.util.find_spec("llguidance") is None:
        return
    given = _schema(random)
    if random.random() < 0.2:
        path = room.input / "schema.json"
        path.write_bytes(damage.to_json(given) if random.random() < 0.7 else damage.some_json(random, b"{}"))
        folder = str(room.watch(room.converted("apple in float32")))
        command(["generate", "-m", folder, "-p", "What?", "-n", "3", "--schema", str(path)])
        return
    followed = Schema.of(given)
    if followed is None:
        return
    answer = random_answer(followed, np.random.default_rng(random.randrange(2**32)), 3000)
    if answer is None:
        return
    try:
        jsonschema.Draft202012Validator(given).validate(json.loads(answer))
    except ValueError as error:
        raise Wrong(f"schema: {answer[:200]!r} is no JSON: {error}") from error
    except jsonschema.ValidationError as error:
        raise Wrong(f"schema: {answer[:200]!r} is not allowed: {error.message[:200]}") from error
