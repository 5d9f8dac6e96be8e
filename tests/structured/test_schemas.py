"""What a user may give as a schema."""

import sys

import pytest

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, SchemaError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.structured.schemas import Schema


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    message = r"need llguidance; install it with: pip install 'fastvlm-mlx\[structured\]'"
    for schema in ("json", {"type": "string"}):
        with pytest.raises(SchemaError, match=message):
            Request(schema=schema)
    assert Request(schema=None).schema is None


class TestWithLlguidance:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

    def test_a_dict_a_class_and_json_are_schemas(self):
        class Model:
            @classmethod
            def model_json_schema(cls):
                return {"title": "Model", "type": "boolean"}

        assert Schema.of(Model) == Schema.of({"type": "boolean"}) != Schema.of("json")
        assert Schema.of("json") == Schema.of(True) == Schema.of({"type": "object"})
        assert Schema.of(None) is Schema.of(False) is None
        schema = Request(schema=Model).schema
        assert Schema.of(schema) is schema

    @pytest.mark.parametrize("wrong", [5, "object", "xml", [], b"{}", object(), 1.0])
    def test_what_is_no_schema_is_refused(self, wrong):
        with pytest.raises(SchemaError, match="must be a JSON schema as a dict, a class with model_json_schema, or"):
            Request(schema=wrong)

    def test_what_is_no_json_is_refused(self):
        endless = {}
        endless["items"] = endless
        for wrong in ({"const": {1, 2}}, {"const": float("nan")}, endless, {"const": "\ud800"}, {"enum": [object()]}):
            with pytest.raises(SchemaError, match="the schema is no JSON: "):
                Schema.of(wrong)

    @pytest.mark.parametrize("levels", [65, 20_000])
    def test_a_schema_that_is_nested_too_deep_is_refused(self, levels):
        schema = {}
        for _ in range(levels):
            schema = {"items": schema}
        with pytest.raises(SchemaError, match="the schema has more than 64 levels of objects and lists"):
            Schema.of(schema)

    def test_a_schema_that_is_too_large_is_refused(self):
        with pytest.raises(SchemaError, match=r"the schema has 600 kB, expected at most 500 kB"):
            Schema.of({"description": "x" * 599_982})

    def test_settings_that_contradict_a_schema_are_refused(self):
        with pytest.raises(ConfigError, match="no sentences; leave sentence out"):
            Request(schema="json", sentence=True)
        with pytest.raises(ConfigError, match="ends where it is complete; leave ignore_eos out"):
            Request(schema="json", config=GenerationConfig(ignore_eos=True))
