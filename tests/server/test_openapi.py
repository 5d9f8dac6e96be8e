"""The description agrees with what is served."""

import json

import jsonschema
import pytest
from starlette.routing import Route

from fastvlm_mlx.server.app import _routes
from fastvlm_mlx.server.openapi import describe
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from tests.server.conftest import run

SETTINGS = Settings()
ROUTES = [route for route in _routes(Service("demo", SETTINGS), SETTINGS) if isinstance(route, Route)]
PATHS = [route.path.replace(":path}", "}") for route in ROUTES]
DESCRIPTION = describe(SETTINGS, PATHS, "demo")
OPERATIONS = [(path, method) for path, item in DESCRIPTION["paths"].items() for method in item]


def schema_of(name):
    """A schema with all that it refers to."""
    return {**DESCRIPTION["components"]["schemas"][name], "components": DESCRIPTION["components"]}


def test_every_address_and_its_methods_are_described():
    methods = {path: route.methods - {"HEAD"} for path, route in zip(PATHS, ROUTES, strict=True)}
    described = {path: {method.upper() for method in item} for path, item in DESCRIPTION["paths"].items()}
    assert described == methods


def test_every_reference_leads_somewhere_and_no_schema_is_left_over():
    text = json.dumps(DESCRIPTION)
    names = set(DESCRIPTION["components"]["schemas"])
    referred = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referred == names
    for name in names:
        jsonschema.Draft202012Validator.check_schema(schema_of(name))
    operations = [operation["operationId"] for item in DESCRIPTION["paths"].values() for operation in item.values()]
    assert len(set(operations)) == len(operations)


def test_keys_are_described_when_they_are_needed():
    assert "security" not in DESCRIPTION
    key = Settings(api_keys=("a-key-of-24-characters-1",))
    assert describe(key, PATHS)["security"] == [{"bearer": []}, {"key": []}]


def responses(path, method):
    return DESCRIPTION["paths"][path][method]["responses"]


def check(answer, described):
    """Checks an answer against what is described for its status."""
    content = described[str(answer.status)]["content"]
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in content
    if media_type == "application/json":
        jsonschema.validate(answer.json, schema_of(content[media_type]["schema"]["$ref"].rpartition("/")[2]))


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_an_example_gets_the_answer_that_is_described(serving, path, method):
    body = DESCRIPTION["paths"][path][method].get("requestBody", {}).get("content", {}).get("application/json")

    async def ask():
        with serving() as (client, _):
            if method == "get":
                return [await client.get(path.replace("{name}", "demo"))]
            jsonschema.validate(body["example"], schema_of(body["schema"]["$ref"].rpartition("/")[2]))
            streamed = await client.post(path, {**body["example"], "stream": True})
            return [await client.post(path, body["example"]), streamed]

    for answer in run(ask()):
        assert answer.status == 200, answer.body
        check(answer, responses(path, method))


@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if each[1] == "post"])
def test_a_refusal_has_the_shape_that_is_described(serving, path, method):
    async def ask():
        with serving(max_body_bytes=1000) as (client, _):
            wrong = [b"{", b"[]", {"messages": 1, "input": 1, "model": "demo", "prompt": 1}, b" " * 1001]
            answers = [await client.post(path, body) for body in wrong]
            answers.append(await client.post(path, {"model": "other", "messages": [], "input": "x"}))
            answers.append(await client.get(path))
            answers.append(await client.post(path, {}, host="evil.example"))
            return answers

    answers = run(ask())
    statuses = [answer.status for answer in answers]
    assert [statuses[0], statuses[1], *statuses[3:]] == [400, 400, 413, 404, 405, 403]
    for answer in answers:
        check(answer, responses(path, method))
