"""Anthropic's messages."""

import base64

import pytest

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.server.anthropic import Messages
from fastvlm_mlx.server.api import ApiError, Context, Question
from tests.server.conftest import SAMPLES, run

PATH = "/v1/messages"
COUNT = "Count the shapes."
DESCRIBE = "Describe the shapes from left to right."
IMAGE = SAMPLES / "sample-1.png"


def picture():
    data = base64.b64encode(IMAGE.read_bytes()).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def shown(text=DESCRIBE):
    """A user's message with a picture, as Anthropic's package sends it."""
    return {"role": "user", "content": [picture(), {"type": "text", "text": text}]}


def ask(client, *messages, path=PATH, **body):
    headers = {"anthropic_version": "2023-06-01", "x_api_key": "none"}
    values = {"model": "demo", "max_tokens": 100, "messages": messages, **body}
    return run(client.post(path, {key: value for key, value in values.items() if value is not None}, **headers))


def test_a_picture_is_described(serving, demo):
    with serving() as (client, _):
        response = ask(client, shown(), system="Be kind.", metadata={"user_id": "me"}, temperature=0.0)
    expected = generate(*demo, image=IMAGE, prompt=DESCRIBE, system="Be kind.")
    answer = response.json
    assert response.status == 200
    assert "x-fastvlm-warning" not in response.headers
    assert answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "demo")
    assert answer["content"] == [{"type": "text", "text": expected.text}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"] == {
        "input_tokens": expected.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": expected.generated_tokens,
    }


def test_a_stream_has_anthropics_events_in_their_order(serving):
    with serving() as (client, _):
        whole = ask(client, shown()).json
        response = ask(client, shown(), stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    names = [name for name, _ in response.named_events]
    deltas = names.count("content_block_delta")
    assert deltas >= 1  # late pieces are sent as one
    assert names == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    events = [data for _, data in response.named_events]
    assert [event["type"] for event in events] == names
    begun = events[0]["message"]
    assert (begun["content"], begun["stop_reason"], begun["usage"]["output_tokens"]) == ([], None, 0)
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert {event["delta"]["type"] for event in events[3:-3]} == {"text_delta"}
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == whole["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert sum(begun["usage"].values()) == sum(whole["usage"].values()) - whole["usage"]["output_tokens"]


def test_tokens_from_the_cache_are_no_input_tokens(serving):
    with serving() as (client, _):
        first, second = (ask(client, shown(text)).json["usage"] for text in (COUNT, COUNT))
    assert first["cache_read_input_tokens"] == 0 < second["cache_read_input_tokens"]
    assert first["input_tokens"] == second["input_tokens"] + second["cache_read_input_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "reason", "sequence"),
    [
        ({"stop_sequences": ["never", " and"]}, "stop_sequence", " and"),
        ({"max_tokens": 2}, "max_tokens", None),
        ({}, "end_turn", None),
    ],
)
def test_the_reason_of_an_end_is_told(serving, stream, settings, reason, sequence):
    with serving() as (client, _):
        response = ask(client, shown(), stream=stream, **settings)
    end = response.named_events[-2][1]["delta"] if stream else response.json
    assert (end["stop_reason"], end["stop_sequence"]) == (reason, sequence)


def test_an_answer_that_the_context_ends_is_told_apart(demo, serving):
    result = generate(*demo, prompt=COUNT, max_tokens=3, ignore_eos=True)
    with serving() as (_, service):
        context = Context(service=service, settings=service.settings, id="1", created=1, start=0.0)
    reasons = []
    for limit in (3, 4):
        question = Question(requests=(Request(config=GenerationConfig(max_tokens=limit)),))
        reasons.append(Messages().whole(question, [result], context)["stop_reason"])
    assert reasons == ["max_tokens", "model_context_window_exceeded"]


def test_blocks_turns_and_thoughts_make_the_same_prompt(serving, demo):
    turns = [
        {"role": "user", "content": [picture()]},
        {"role": "user", "content": [{"type": "text", "text": DESCRIBE, "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "Three."}],
        },
        {"role": "user", "content": COUNT},
    ]
    system = [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Say little."}]
    with serving() as (client, _):
        answer = ask(client, *turns, system=system).json
        count = ask(client, *turns, system=system, max_tokens=None, path=f"{PATH}/count_tokens").json
    messages = [
        {"role": "user", "content": [{"type": "image", "path": IMAGE}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": COUNT},
    ]
    expected = generate(*demo, prompt=messages, system="Be kind.\nSay little.")
    assert answer["content"][0]["text"] == expected.text
    assert answer["usage"]["input_tokens"] == expected.prompt_tokens
    assert count == {"input_tokens": expected.prompt_tokens}


def test_tokens_are_counted_at_the_resolution_that_counts(serving):
    path = f"{PATH}/count_tokens"
    with serving() as (client, _):
        small, large = (ask(client, shown(), path=path, resolution=side).json["input_tokens"] for side in (64, 256))
    assert large - small == (256 // 64) ** 2 - 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": None}, "max_tokens is missing; it must be a whole number, at least 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number, at least 1, not 0"),
        ({"max_tokens": -1}, "max_tokens must be a whole number, at least 1, not -1"),
        ({"messages": []}, "messages must be a list of messages, with one at least, not []"),
        ({"messages": [3]}, "messages[0] must be an object, not 3"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "must be a text block, or an image block",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}
                ]
            },
            "messages[0].content[0] must be a text block, or an image block with a base64 or url source",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is"}]},
            "the last message must be the user's",
        ),
        ({"system": [picture()]}, "images can only be shown in user messages"),
        ({"tools": [{"name": "t"}]}, "tools is not supported: this server calls no tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is not supported: this server calls no tools"),
        ({"stop_sequences": [""]}, "stop_sequences must be a text or a list of at most 16 texts"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is missing"),
        ({"output_config": {"format": {"schema": {}}}}, "output_config.format.type is missing"),
    ],
)
def test_errors_have_anthropics_shape(serving, body, message):
    with serving() as (client, _):
        response = ask(client, **{"messages": [{"role": "user", "content": "a"}], **body})
    assert response.status == 400
    assert response.json["type"] == "error"
    assert response.json["error"]["type"] == "invalid_request_error"
    assert message in response.json["error"]["message"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (503, "overloaded_error"),
        (500, "api_error"),
    ],
)
def test_a_status_has_anthropics_word(status, kind):
    error = ApiError(status, "no")
    assert Messages().error(error) == {"type": "error", "error": {"type": kind, "message": "no"}}
    assert Messages().broken(error).startswith(b"event: error\ndata: {")


def test_another_model_is_not_found(serving):
    with serving() as (client, _):
        response = ask(client, {"role": "user", "content": "a"}, model="claude")
    assert (response.status, response.json["error"]["type"]) == (404, "not_found_error")


def test_an_address_of_anthropics_that_is_not_served_has_its_shape_of_errors(serving):
    with serving() as (client, _):
        response = run(client.post(f"{PATH}/batches", {}))
    assert (response.status, response.json["type"], response.json["error"]["type"]) == (404, "error", "not_found_error")


def test_what_changes_nothing_is_left_out_and_said(serving):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with serving() as (client, _):
        said = ask(client, shown(COUNT), thinking=thinking, output_config={"effort": "low"}, mood=3)
        silent = ask(client, shown(COUNT), thinking={"type": "disabled"}, tool_choice={"type": "auto"}, tools=[])
    assert said.headers["x-fastvlm-warning"] == "ignored: thinking, mood, output_config.effort"
    assert (silent.status, silent.headers.get("x-fastvlm-warning")) == (200, None)
