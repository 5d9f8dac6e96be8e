"""What a schema leaves open gets bounds; every answer within them is one that the schema allows."""

import json

import jsonschema
import numpy as np
import pytest

from fastvlm_mlx.errors import SchemaError
from tests.structured.random_schemas import random_schema

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

from fastvlm_mlx.structured.narrowing import narrowed
from fastvlm_mlx.structured.schemas import Schema
from tests.structured.answers import is_allowed, random_answer


@pytest.mark.parametrize("seed", range(30))
def test_every_answer_is_finite_and_one_that_the_schema_allows(seed):
    rng = np.random.default_rng(seed)
    schema = random_schema(rng)
    for _ in range(2):
        value = json.loads(random_answer(schema, rng))
        jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize(
    ("schema", "most", "more"),
    [
        ({"type": "string"}, "x" * 512, "x" * 513),
        ({"type": "string", "minLength": 600}, "x" * 600, "x" * 601),
        ({"type": "string", "maxLength": 600}, "x" * 600, "x" * 601),
        ({"type": "array", "items": {"type": "null"}}, [None] * 32, [None] * 33),
        ({"type": "array", "items": {"type": "null"}, "minItems": 40}, [None] * 40, [None] * 41),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 40}, [None] * 40, [None] * 41),
        ({"prefixItems": [{"type": "null"}]}, [None], [None, None]),
        ({"items": [{"type": "null"}], "additionalItems": True}, [None], [None, None]),
        ({"type": "object"}, {f"k{n}": n for n in range(32)}, {f"k{n}": n for n in range(33)}),
        ({"type": "object"}, {"x" * 64: 1}, {"x" * 65: 1}),
        ({"properties": {"a": {"type": "null"}}}, {"a": None}, {"a": None, "b": None}),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"a": 1}, {"a": 1, "b": 1}),
        ({"additionalProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
        ({"type": "integer"}, 2**53 - 1, 2**53),
        ({"type": "integer"}, -(2**53) + 1, 1.5),
        ({"type": "integer", "format": "int32"}, 2**31 - 1, 2**31),
        ({"type": "number"}, 0.123456, 0.1234567),
        ({"type": "number", "minimum": 0.00000001}, 0.12345678, 0.123456789),
        ({"minimum": 3}, 3, "x"),
        ({"pattern": "^x+$"}, "xx", 3),
        ({}, [[[1]]], [[[[1]]]]),
        (True, {"a": {"b": {"c": {"d": 1}}}}, {"a": {"b": {"c": {"d": {"e": 1}}}}}),
        ("json", {}, []),
    ],
)
def test_what_is_left_open_has_bounds(schema, most, more):
    assert is_allowed(schema, json.dumps(most, separators=(",", ":")))
    assert not is_allowed(schema, json.dumps(more, separators=(",", ":")))


def test_no_space_is_allowed_between_tokens():
    schema = {"properties": {"a": {"items": {"type": "null"}}, "b": {}}, "required": ["a", "b"]}
    assert is_allowed(schema, '{"a":[null,null],"b":1}')
    for text in (
        ' {"a":[],"b":1}',
        '{ "a":[],"b":1}',
        '{"a": [],"b":1}',
        '{"a":[null, null],"b":1}',
        '{"a":[],"b":1}\n',
    ):
        assert not is_allowed(schema, text)


def test_properties_come_in_the_order_of_the_schema():
    schema = {"properties": {"b": {"const": 1}, "a": {"const": 2}}, "required": ["a", "b"]}
    assert is_allowed(schema, '{"b":1,"a":2}')
    assert not is_allowed(schema, '{"a":2,"b":1}')


def test_a_schema_within_itself_ends_after_five_levels():
    tree = {"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"of": {"items": {"$ref": "#/$defs/tree"}}}}}}
    text = "{}"
    for level in range(7):
        assert is_allowed(tree, text) == (level < 5)
        text = f'{{"of":[{text}]}}'
    endless = {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    with pytest.raises(SchemaError, match="the schema allows no finite answer"):
        narrowed(endless)


def test_a_choice_that_cannot_be_finite_is_left_out():
    node = {"anyOf": [{"type": "null"}, {"properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}]}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    assert is_allowed(schema, '{"next":{"next":null}}')


def test_objects_that_must_all_hold_do_not_forbid_each_other():
    base = {"properties": {"a": {"const": 1}}, "required": ["a"]}
    schema = {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]}
    assert is_allowed({**schema, "$defs": {"base": base}}, '{"a":1,"b":2}')
    assert not is_allowed({**schema, "$defs": {"base": base}}, '{"a":1,"b":2,"c":3}')
    either = {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    assert [is_allowed(either, text) for text in ('{"a":1}', '{"b":2}', '{"a":1,"b":2}', "{}")] == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "schema at #: the keyword 'not' is not supported; leave it out"),
        ({"properties": {"a": {"uniqueItems": True}}}, "schema at #/properties/a: the keyword 'uniqueItems' is not"),
        ({"items": {"if": {}, "then": {}}}, "schema at #/items: the keyword 'if' is not supported"),
        ({"contains": {}}, "the keyword 'contains' is not supported"),
        ({"properties": {"a": {"maxLenght": 3}}}, "unknown keyword 'maxLenght'; is it misspelt?"),
        ({"anyOf": [{}, {"dependentRequired": {}}]}, "schema at #/anyOf/1: the keyword 'dependentRequired' is not"),
        ({"$ref": "https://example.org/s.json"}, r"#/\$ref: 'https://example.org/s.json' is no part of this schema"),
        ({"$ref": "other.json#/a"}, "nothing is fetched"),
        ({"$ref": "#/$defs/a"}, r"there is no '#/\$defs/a' in this schema"),
        ({"type": "strin"}, "#/type: must be one or several of object, array, string, .*, not 'strin'"),
        ({"type": []}, r"#/type: must be one or several of .*, not \[\]"),
        ({"enum": []}, "#/enum: must be a list that is not empty"),
        ({"enum": ["a"], "minLength": 3}, "the keyword 'minLength' is not supported beside 'enum' or 'const'"),
        ({"const": 2**53}, "a number from .* to .*, not 9007199254740992"),
        ({"minimum": 1e300}, r"#/minimum: must be a number from -\(2\*\*53 - 1\) to 2\*\*53 - 1, not 1e\+300"),
        ({"exclusiveMinimum": True}, "#/exclusiveMinimum: must be a number"),
        ({"maxLength": -1}, "#/maxLength: must be a whole number from 0 to 1000000, not -1"),
        ({"maxItems": 2.5}, "#/maxItems: must be a whole number"),
        ({"multipleOf": 0}, "#/multipleOf: must be a number above 0"),
        ({"properties": []}, r"#/properties: must be an object of schemas, not \[\]"),
        ({"properties": {"a": 5}}, "#/properties/a: must be a schema, an object"),
        ({"required": "a"}, "#/required: must be a list of names, not 'a'"),
        ({"anyOf": {}}, "#/anyOf: must be a list of schemas"),
        ({"pattern": 5}, "#/pattern: must be a text"),
        ({"format": "cuid"}, "the format 'cuid' is not supported; leave it out or use one of date, date-time"),
        ({1: 2}, "a keyword must be a text, not 1"),
        ({"type": "string", "pattern": "(?=a)b"}, "the schema cannot be used: regex parse error.*look-around"),
        ({"type": "string", "pattern": "["}, "the schema cannot be used: regex parse error"),
        (
            {"type": "integer", "minimum": 5, "maximum": 2},
            r"minimum \(5\) is greater than maximum",
        ),
        (
            {"oneOf": [{"type": "number"}, {"type": "integer"}]},
            "the parts of a oneOf may overlap; give each another constant",
        ),
        ({"anyOf": [False]}, "the schema allows no finite answer"),
    ],
)
def test_what_cannot_be_ensured_is_refused_by_name(schema, message):
    with pytest.raises(SchemaError, match=message):
        Schema.of(schema)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"const": "cat"}, {"const": "dog"}], '{"kind":"dog","n":1}'),
        ([{"enum": ["cat", "lion"], "type": "string"}, {"enum": ["dog", 3]}], '{"kind":3,"n":1}'),
        ([{"$ref": "#/$defs/cat"}, {"const": "dog"}], '{"kind":"cat","n":1}'),
    ],
)
def test_parts_of_a_one_of_are_told_apart_by_a_constant(parts, text):
    """As pydantic writes unions: each part behind a reference."""
    whole = {"type": "integer"}
    objects = [{"properties": {"kind": part, "n": whole}, "required": ["kind", "n"]} for part in parts]
    schema = {
        "oneOf": [{"$ref": "#/$defs/first"}, {"allOf": [{"$ref": "#/$defs/second"}]}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {"first": objects[0], "second": objects[1], "cat": {"const": "cat"}},
    }
    assert is_allowed(schema, text)
    assert not is_allowed(schema, '{"kind":"bird","n":1}')


def test_parts_of_a_one_of_are_told_apart_by_their_types():
    parts = [{"$ref": "#/$defs/free"}, {"type": ["integer", "null"]}, {"oneOf": [{"type": "string"}, {"items": {}}]}]
    schema = {"oneOf": parts, "$defs": {"free": {"type": "object"}}}
    assert all(is_allowed(schema, text) for text in ("{}", "3", "null", '"x"', "[1]"))
    assert not is_allowed(schema, "true")


def test_annotations_mean_nothing():
    notes = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "title": "t", "description": "d"}
    notes |= {"default": 1, "examples": [1], "x-order": 3, "deprecated": True, "$comment": "not", "nullable": True}
    assert narrowed({**notes, "type": "boolean"}) == {"type": "boolean"}
    assert narrowed({"properties": {"title": {"type": "null", **notes}}})["properties"] == {"title": {"type": "null"}}


def test_a_reference_may_name_any_part():
    parts = {"a~/%": {"type": "null"}}
    schema = {"properties": {"x": {"$ref": "#/definitions/a~0~1%25"}, "y": {"$ref": "#/properties/x"}}}
    assert is_allowed({**schema, "definitions": parts}, '{"x":null,"y":null}')


def test_a_schema_with_too_many_parts_is_refused():
    parts = {
        f"p{n}": {"properties": {f"x{k}": {"$ref": f"#/$defs/p{(n + k) % 60}"} for k in range(60)}} for n in range(60)
    }
    with pytest.raises(SchemaError, match="the schema has more than 10000 parts"):
        narrowed({"$ref": "#/$defs/p0", "$defs": parts})
