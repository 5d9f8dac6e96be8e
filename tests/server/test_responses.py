"""OpenAI's responses."""

import pytest

from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.server.api import ApiError, Context, Question
from fastvlm_mlx.server.openai_responses import Responses
from tests.server.conftest import SAMPLES, data_url, run

PATH = "/v1/responses"
DESCRIBE = "Describe the shapes from left to right."


def picture(text=DESCRIBE, name="sample-1.png", **image):
    """A user's message as PhotoPrism sends it."""
    content = [
        {"type": "input_text", "text": text},
        {"type": "input_image", "image_url": data_url(name), "detail": "low", **image},
    ]
    return {"role": "user", "type": "message", "content": content}


def ask(client, **body):
    return run(client.post(PATH, {"model": "demo", **body}))


def test_a_picture_is_described_as_photoprism_asks_for_it(serving, demo):
    with serving() as (client, _):
        response = ask(
            client,
            input=[picture()],
            max_output_tokens=512,
            reasoning={"effort": "low"},
            text={"verbosity": "low"},
            temperature=0.0,
            top_p=0.9,
            store=False,
        )
    expected = generate(*demo, image=SAMPLES / "sample-1.png", prompt=DESCRIBE)
    answer = response.json
    assert response.status == 200
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "demo")
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": expected.text, "annotations": [], "logprobs": []}]
    assert answer["usage"]["input_tokens"] == expected.prompt_tokens
    assert answer["usage"]["input_tokens_details"]["image_tokens"] == expected.visual_tokens
    assert answer["usage"]["output_tokens"] == expected.generated_tokens
    assert answer["usage"]["total_tokens"] == expected.prompt_tokens + expected.generated_tokens
    assert (answer["top_p"], answer["max_output_tokens"]) == (0.9, 512)
    assert response.headers["x-fastvlm-warning"] == "ignored: reasoning, text.verbosity"


def test_a_stream_has_openais_events_in_their_order(serving):
    with serving() as (client, _):
        whole = ask(client, input=[picture()]).json
        response = ask(client, input=[picture()], stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    names = [name for name, _ in response.named_events]
    deltas = names.count("response.output_text.delta")
    assert deltas >= 1  # late pieces are sent as one
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    events = [data for _, data in response.named_events]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(event["delta"] for event in events[4 : 4 + deltas]) == text
    assert events[4 + deltas]["text"] == text
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {events[2]["item"]["id"]} == {events[-1]["response"]["output"][0]["id"]}

    def lasting(answer):
        own = {"id", "created_at", "timings", "output", "usage"}
        return {key: value for key, value in answer.items() if key not in own}, answer["output"][0]["content"]

    assert lasting(events[-1]["response"]) == lasting(whole)
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_is_incomplete(serving, stream):
    with serving() as (client, _):
        response = ask(client, input=[picture()], max_output_tokens=2, stream=stream)
    name, data = response.named_events[-1] if stream else ("response.incomplete", {"response": response.json})
    answer = data["response"]
    assert (name, answer["status"]) == ("response.incomplete", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (answer["output"][0]["status"], answer["usage"]["output_tokens"]) == ("incomplete", 2)


def test_the_input_may_be_a_text_or_earlier_turns(serving, demo):
    turns = [
        picture(),
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Three.", "annotations": []}],
        },
        {"role": "user", "content": "Count the shapes."},
    ]
    with serving() as (client, _):
        text = ask(client, input="Count the shapes.")
        conversation = ask(client, input=turns)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": SAMPLES / "sample-1.png"}, {"type": "text", "text": DESCRIBE}],
        },
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Count the shapes."},
    ]
    for response, prompt in ((text, "Count the shapes."), (conversation, messages)):
        expected = generate(*demo, prompt=prompt)
        assert response.json["output"][0]["content"][0]["text"] == expected.text
        assert response.json["usage"]["input_tokens"] == expected.prompt_tokens
    assert conversation.headers["x-fastvlm-warning"] == "ignored: input[1]"


def test_instructions_and_a_developers_message_are_the_system_text(serving, demo):
    items = [{"role": "developer", "content": "Say little."}, {"role": "user", "content": "Count."}]
    with serving() as (client, _):
        response = ask(client, instructions="Be kind.", input=items)
    expected = generate(*demo, prompt="Count.", system="Be kind.\nSay little.")
    assert response.json["output"][0]["content"][0]["text"] == expected.text
    assert response.json["usage"]["input_tokens"] == expected.prompt_tokens
    assert response.json["instructions"] == "Be kind."


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id",
            "no answer is stored; send the whole conversation",
        ),
        ({"conversation": "conv_1"}, "conversation", "no conversation is stored"),
        ({"background": True}, "background", "every answer is sent at once"),
        ({"tools": [{"type": "web_search"}]}, "tools", "this server calls no tools"),
        ({"tool_choice": "required"}, "tool_choice", "this server calls no tools"),
        ({"input": None}, "input", "input is missing; it must be a text or a list of messages"),
        ({"input": 3}, "input", "input must be a text or a list of messages, not 3"),
        ({"input": []}, "input", "input must be a list of messages, with one at least"),
        ({"input": [3]}, "input[0]", "input[0] must be an object, not 3"),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]},
            "input[0].type",
            "input[0].type must be message, not 'function_call_output'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
            "must be text or image_url, not 'input_file'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
            "must be a data: URL, not None",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be a whole number, at least 1, not 0"),
        ({"temperature": "hot"}, "temperature", "temperature must be a number from 0 to 100, not 'hot'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "must be one of text, json_object, json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing; it must be a JSON schema"),
        ({"truncation": "some"}, "truncation", "must be one of auto, disabled"),
        ({"include": [3]}, "include", "include must be a text or a list"),
        ({"metadata": 3}, "metadata", "metadata must be an object, not 3"),
    ],
)
def test_what_would_change_the_meaning_is_refused_by_its_name(serving, body, param, message):
    with serving() as (client, _):
        response = ask(client, **{"input": "Count.", **body})
    assert response.status == 400
    assert response.json["error"]["type"] == "invalid_request_error"
    assert response.json["error"]["param"] == param
    assert message in response.json["error"]["message"]


def test_what_changes_nothing_is_left_out_and_said(serving):
    with serving() as (client, _):
        response = ask(
            client,
            input="Count.",
            store=True,
            truncation="auto",
            user="me",
            metadata={"a": "b"},
            mood=3,
            include=["reasoning.encrypted_content"],
        )
    assert response.status == 200
    assert response.headers["x-fastvlm-warning"] == "ignored: store, truncation, include, mood"
    assert (response.json["store"], response.json["metadata"]) == (False, {"a": "b"})


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_come_with_the_text(serving, stream):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": stream}
    with serving() as (client, _):
        response = ask(client, input=[picture("Count the shapes.")], **wanted)
    answer = response.named_events[-1][1]["response"] if stream else response.json
    part = answer["output"][0]["content"][0]
    (token,) = part["logprobs"]
    assert (token["token"], token["bytes"]) == (part["text"], list(part["text"].encode()))
    assert [each["logprob"] for each in token["top_logprobs"]] == sorted(
        (each["logprob"] for each in token["top_logprobs"]), reverse=True
    )
    assert token["top_logprobs"][0]["token"] == part["text"]
    if stream:
        deltas = [data for name, data in response.named_events if name == "response.output_text.delta"]
        assert [each for data in deltas for each in data["logprobs"]] == part["logprobs"]


def test_a_stream_that_an_error_ends_says_that_it_failed(demo, serving):
    with serving() as (_, service):
        piece = generate(*demo, prompt="Count.", max_tokens=1)
        context = Context(service=service, settings=service.settings, id="1", created=1, start=0.0)

        async def pieces():
            yield 0, piece
            raise ApiError(503, "the server is stopping")

        collected = []

        async def read():
            async for part in Responses().stream(Question(requests=()), pieces(), context):
                collected.append(part)

        with pytest.raises(ApiError, match="stopping"):
            run(read())
    last = b"".join(collected).decode().split("\n\n")[-2]
    assert last.startswith("event: response.failed\n")
    assert '"error":{"code":"server_error","message":"the server is stopping"}' in last
