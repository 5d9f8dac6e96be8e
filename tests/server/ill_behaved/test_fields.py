"""Whatever a field of a request holds, the answer is one of 200, 4xx and 503, in the shape of the API."""

import json
import random

import pytest

from fastvlm_mlx.server.app import APIS
from tests.server.conftest import run
from tests.server.ill_behaved import fields
from tests.server.ill_behaved.clients import BODIES

PATHS = [api.path for api in APIS]


def message_of(answer):
    """The message of an error, wherever the API has it."""
    error = answer.json["error"]
    return error if isinstance(error, str) else error["message"]


async def check(client, path, body):
    """Sends a request; what comes back must be an answer or an error that someone can use."""
    answer = await client.post(path, body if isinstance(body, bytes) else fields.encode(body))
    assert answer.status in (200, 400, 404, 413, 429, 503), f"{path} {body!r:.500}: {answer.status} {answer.body!r}"
    if answer.status != 200:
        message = message_of(answer)
        assert message, body
        assert message.isprintable(), message
        assert len(message) <= 500
        assert "Traceback" not in message
    return answer


@pytest.mark.parametrize("path", PATHS)
def test_no_value_in_no_field_is_an_error_of_the_server(path, serving, pytestconfig, caplog):
    everything = list(fields.requests(path))
    number = pytestconfig.getoption("--requests")
    chosen = random.Random(path).sample(everything, min(number, len(everything)))

    async def ask():
        with serving(max_tokens=8) as (client, _):
            for place, value in chosen:
                await check(client, path, fields.changed(fields.example(path), place, value))

    run(ask())
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_request_is_refused(path, name, serving):
    async def ask():
        with serving(max_tokens=8) as (client, _):
            return await check(client, path, BODIES[name])

    assert run(ask()).status in (400, 404)


@pytest.mark.parametrize("path", PATHS)
def test_a_key_that_appears_twice_or_a_name_that_is_no_header_is_no_harm(path, serving):
    body = json.dumps(fields.example(path))[:-1].encode()

    async def ask():
        with serving(max_tokens=8) as (client, _):
            for more in (b', "model": "demo", "model": "demo"}', b', "": 1}', b', " ": 1, "\\n": 2, "\\u00e9": 3}'):
                assert (await check(client, path, body + more)).status == 200

    run(ask())


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"]
)
def test_a_thousand_images_are_refused_at_once(path, serving):
    body = fields.example(path)
    if path == "/api/generate":
        body["images"] *= 1000
    elif path == "/api/chat":
        body["messages"][0]["images"] *= 1000
    else:
        parts = body["input" if path == "/v1/responses" else "messages"][0]["content"]
        parts += [part for part in parts if "image" in str(part["type"])] * 999

    async def ask():
        with serving(max_tokens=8) as (client, _):
            return await check(client, path, body)

    answer = run(ask())
    assert answer.status == 400
    assert "a request can have at most 16 images" in message_of(answer)
