"""Answers in the form of a JSON schema, in the words of each API."""

import json

import pytest

from fastvlm_mlx.structured import schemas
from tests.server.conftest import data_url, run
from tests.server.test_applications import answer_text

ANIMAL = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
FORWARD = {"type": "string", "not": {"const": "a"}}
"""A schema that answers cannot be made to follow."""
QUESTION = "Count the shapes."
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def bodies(schema):
    """A path and a body of each API, for the same question."""
    strict = {"name": "animal", "strict": True, "schema": schema}
    turn = {"role": "user", "content": QUESTION}
    return {
        "chat": (CHAT, {"messages": [turn], "response_format": {"type": "json_schema", "json_schema": strict}}),
        "responses": (RESPONSES, {"input": QUESTION, "text": {"format": {"type": "json_schema", **strict}}}),
        "messages": (
            MESSAGES,
            {
                "messages": [turn],
                "max_tokens": 200,
                "output_config": {"format": {"type": "json_schema", "schema": schema}},
            },
        ),
        "generate": ("/api/generate", {"prompt": QUESTION, "format": schema}),
        "ollama chat": ("/api/chat", {"messages": [turn], "format": schema}),
    }


def check(text):
    value = json.loads(text)
    assert value.keys() == {"name", "legs"}
    assert len(value["name"]) <= 5
    assert value["legs"] in range(9)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", bodies({}))
def test_an_answer_follows_the_schema(serving, api, stream):
    path, body = bodies(ANIMAL)[api]
    with serving() as (client, _):
        response = run(client.post(path, {"model": "demo", "stream": stream, **body}))
    check(answer_text(response))
    assert "x-fastvlm-warning" not in response.headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": QUESTION}], "response_format": {"type": "json_object"}}),
        (RESPONSES, {"input": QUESTION, "text": {"format": {"type": "json_object"}}}),
        ("/api/generate", {"prompt": QUESTION, "format": "json", "stream": False}),
        ("/api/chat", {"messages": [{"role": "user", "content": QUESTION}], "format": {"type": "object"}}),
    ],
)
def test_any_object_may_be_asked_for(serving, path, body):
    limits = {"max_tokens": 300, "max_output_tokens": 300, "options": {"num_predict": 300}}
    with serving() as (client, _):
        text = answer_text(run(client.post(path, {"model": "demo", **body, **limits})))
    assert text.startswith("{")
    if text.endswith("}"):
        assert isinstance(json.loads(text), dict)


def test_an_object_with_a_schema_follows_it(serving):
    form = {"type": "json_object", "schema": ANIMAL}
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "response_format": form}
    with serving() as (client, _):
        check(answer_text(run(client.post(CHAT, body))))


@pytest.mark.parametrize("api", bodies({}))
def test_a_schema_that_cannot_be_followed_is_refused_before_the_work(serving, api):
    path, body = bodies(FORWARD)[api]
    with serving() as (client, _):
        response = run(client.post(path, {"model": "demo", **body}))
    assert response.status == 400
    assert "not" in response.body.decode()
    assert "format" in response.body.decode()


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": "a"}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": ANIMAL, "strict": "yes"}},
            "response_format.json_schema.strict",
        ),
        ({"type": "json_schema", "json_schema": {"schema": ANIMAL, "name": {}}}, "response_format.json_schema.name"),
        ("json", "response_format"),
    ],
)
def test_a_format_without_a_schema_is_refused_by_its_name(serving, form, param):
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "response_format": form}
    with serving() as (client, _):
        error = run(client.post(CHAT, body)).json["error"]
    assert error["param"] == param


def test_without_the_extra_the_package_to_install_is_named(serving, monkeypatch):
    def missing():
        raise schemas.SchemaError("install it with: pip install 'fastvlm-mlx[structured]'")

    monkeypatch.setattr(schemas, "library", missing)
    path, body = bodies(ANIMAL)["chat"]
    with serving() as (client, _):
        response = run(client.post(path, {"model": "demo", **body}))
    assert response.status == 400
    assert "fastvlm-mlx[structured]" in response.json["error"]["message"]


def test_frigate_gets_its_schema_from_three_frames(serving):
    frames = [
        {"type": "image_url", "image_url": {"url": data_url(f"sample-{n}.png"), "detail": "low"}} for n in (1, 2, 3)
    ]
    path, body = bodies(ANIMAL)["chat"]
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, *frames]}]
    with serving() as (client, _):
        check(answer_text(run(client.post(path, {"model": "demo", **body}))))
