"""Anthropic's package against a real server."""

import base64

import pytest

anthropic = pytest.importorskip(
    "anthropic", reason="the client packages are not installed; `make test-clients` installs them"
)

DESCRIBE = "Describe the shapes from left to right."
DESCRIPTION = "A green triangle, a black cross and a green cross."


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key=server.key, max_retries=0)


@pytest.fixture
def messages(image):
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
    return [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": DESCRIBE}]}]


def test_a_whole_message(client, messages):
    message = client.messages.create(model="demo", max_tokens=64, messages=messages, system="Be brief.")
    (block,) = message.content
    assert (block.type, block.text, message.stop_reason) == ("text", DESCRIPTION, "end_turn")
    assert message.usage.output_tokens > 5


def test_a_streamed_message(client, messages):
    with client.messages.stream(model="demo", max_tokens=64, messages=messages) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert texts
    assert "".join(texts) == message.content[0].text == DESCRIPTION
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 5


def test_a_stop_sequence(client, messages):
    message = client.messages.create(model="demo", max_tokens=64, messages=messages, stop_sequences=[" and"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " and")
    assert message.content[0].text == "A green triangle, a black cross"


def test_tokens_are_counted_without_an_answer(client, messages):
    counted = client.messages.count_tokens(model="demo", messages=messages).input_tokens
    usage = client.messages.create(model="demo", max_tokens=1, messages=messages).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_are_anthropics(client, messages):
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(
            model="demo", max_tokens=64, messages=messages, tools=[{"name": "t", "input_schema": {}}]
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=64, messages=messages)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="demo", max_tokens=64, messages=messages)
