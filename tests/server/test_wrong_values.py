"""Wrong values in every place of a request, in every API: an error of its shape, never a bug."""

import base64
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import SAMPLES, data_url, run

DATA = base64.b64encode((SAMPLES / "sample-1.png").read_bytes()).decode()
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
PICTURE = {"type": "image_url", "image_url": {"url": data_url(), "detail": "low"}}
TURN = {"role": "user", "content": [{"type": "text", "text": "Count."}, PICTURE]}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "logit_bias": {"5": 1}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "demo",
        "messages": [{"role": "system", "content": "Be brief."}, TURN],
        **SAMPLING,
        "max_tokens": 2,
        "n": 1,
        "stop": ["x"],
        "stream": False,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 1,
        "presence_penalty": 0.1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "resolution": 192,
    },
    "/v1/responses": {
        "model": "demo",
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "type": "message",
                "content": [
                    {"type": "input_text", "text": "Count."},
                    {"type": "input_image", "image_url": data_url(), "detail": "low"},
                ],
            }
        ],
        **SAMPLING,
        "max_output_tokens": 2,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA}},
        "truncation": "auto",
        "store": False,
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "model": "demo",
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Count."},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
                ],
            }
        ],
        "max_tokens": 2,
        "stop_sequences": ["x"],
        **SAMPLING,
        "thinking": {"type": "disabled"},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "/v1/messages/count_tokens": {
        "model": "demo",
        "messages": [{"role": "user", "content": "Count."}],
        "system": "Hm.",
    },
    "/api/generate": {
        "model": "demo",
        "prompt": "Count.",
        "system": "Be brief.",
        "images": [DATA],
        "format": SCHEMA,
        "stream": False,
        "think": False,
        "logprobs": True,
        "top_logprobs": 1,
        "options": {**SAMPLING, "num_predict": 2, "stop": ["x"], "repeat_penalty": 1.1, "num_ctx": 100},
    },
    "/api/chat": {
        "model": "demo",
        "messages": [{"role": "user", "content": "Count.", "images": [DATA]}],
        "format": "json",
        "stream": False,
        "options": {"num_predict": 2},
    },
    "/api/show": {"model": "demo", "verbose": True},
}
LONG = "é" * 2000
VALUES: tuple[Any, ...] = (None, True, 0, -1, 2**70, 1.5, 1e300, "", "x", "demo", LONG, [], [None], [[1]], {}, {"x": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within another."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return new
    if isinstance(value, dict):
        return {key: replaced(each, path[1:], new) if key == path[0] else each for key, each in value.items()}
    return [replaced(each, path[1:], new) if number == path[0] else each for number, each in enumerate(value)]


def check(path: str, response: Any, what: Any) -> None:
    assert response.status in (200, 400, 404), (what, response.status, response.body)
    if response.status == 200:
        return
    error = response.json["error"]
    if path.startswith("/api/"):
        message = error
    else:
        message = error["message"]
        assert error["type"] == ("not_found_error" if response.status == 404 and "messages" in path else error["type"])
        assert response.json.get("type") == ("error" if path.startswith("/v1/messages") else None)
    assert message, what
    assert len(message) <= 600
    assert message.isprintable(), message


@pytest.mark.parametrize("path", BODIES)
def test_a_wrong_value_anywhere_is_an_error_of_the_apis_shape(serving, path, request):
    cases = [(place, value) for place in places(BODIES[path]) for value in VALUES]
    number = request.config.getoption("--requests")
    chosen = cases if number > 1000 else random.Random(path).sample(cases, min(len(cases), number // 2))

    async def ask(client):
        assert (await client.post(path, BODIES[path])).status == 200
        for place, value in chosen:
            check(path, await client.post(path, replaced(BODIES[path], place, value)), (place, value))

    with serving() as (client, service):
        run(ask(client))
        assert service.running == 0
