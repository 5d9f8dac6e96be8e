"""OpenAI's package against a real server."""

import time

import pytest

openai = pytest.importorskip(
    "openai", reason="the client packages are not installed; `make test-clients` installs them"
)

DESCRIBE = "Describe the shapes from left to right."
DESCRIPTION = "A green triangle, a black cross and a green cross."
NEVER_ENDS = {"637": -100, "639": -100}
"""A bias against the tokens that end the demo model's answers."""


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)


@pytest.fixture(scope="module")
def narrow(narrow_server):
    return openai.OpenAI(base_url=f"{narrow_server.url}/v1", api_key=narrow_server.key, max_retries=0)


@pytest.fixture
def messages(image_url):
    picture = {"type": "image_url", "image_url": {"url": image_url, "detail": "auto"}}
    return [{"role": "user", "content": [{"type": "text", "text": DESCRIBE}, picture]}]


def test_a_whole_answer(client, messages):
    answer = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=64)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (DESCRIPTION, "stop")
    assert choice.message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 9  # the visual tokens of 192 pixels
    assert answer.system_fingerprint.startswith("fp_")


def test_a_stream_with_usage(client, messages):
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == DESCRIPTION
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens >= len(chunks) - 1


def test_a_stream_that_is_aborted_frees_its_place(narrow, messages):
    with narrow.chat.completions.create(
        model="demo", messages=messages, stream=True, logit_bias=NEVER_ENDS, max_tokens=2000
    ) as stream:
        for _ in range(3):
            next(stream)
    begin = time.monotonic()
    while True:
        try:
            answer = narrow.chat.completions.create(model="demo", messages=messages)
            break
        except openai.RateLimitError:
            assert time.monotonic() < begin + 2
    assert answer.choices[0].message.content == DESCRIPTION


def test_several_answers(client, messages):
    answer = client.chat.completions.create(
        model="demo", messages=messages, n=2, temperature=3.0, seed=1, max_tokens=12, logit_bias=NEVER_ENDS
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len({choice.message.content for choice in answer.choices}) == 2
    assert answer.usage.completion_tokens == 24


def test_a_seed_repeats_an_answer(client, messages):
    def ask(seed):
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=3.0, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


def test_a_stop_string(client, messages):
    answer = client.chat.completions.create(model="demo", messages=messages, stop=[" and", "never"])
    assert answer.choices[0].message.content == "A green triangle, a black cross"
    assert answer.choices[0].finish_reason == "stop"


def test_probabilities_of_tokens(client, messages):
    answer = client.chat.completions.create(model="demo", messages=messages, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == DESCRIPTION
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, None),
    ],
)
def test_a_bad_request_names_what_is_wrong(client, messages, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": messages, **options})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param or caught.value.param.startswith("messages[0].content[0]")
    assert caught.value.body["message"]


def test_a_wrong_key_and_an_unknown_model(client, server, messages):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=messages)
    assert caught.value.code == "model_not_found"


def test_a_full_server_says_when_to_come_back(narrow, messages):
    with narrow.chat.completions.create(
        model="demo", messages=messages, stream=True, logit_bias=NEVER_ENDS, max_tokens=300
    ) as stream:
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            narrow.chat.completions.create(model="demo", messages=messages)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = narrow.with_options(max_retries=10)
        answer = patient.chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == DESCRIPTION


def test_the_list_of_models(client):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len, model.license) == ("demo", 2048, "mit")
    assert client.models.retrieve("demo").id == "demo"


@pytest.fixture
def items(image_url):
    picture = {"type": "input_image", "image_url": image_url, "detail": "low"}
    return [{"role": "user", "content": [{"type": "input_text", "text": DESCRIBE}, picture]}]


def test_a_whole_response(client, items):
    response = client.responses.create(
        model="demo", input=items, instructions="Be brief.", max_output_tokens=64, reasoning={"effort": "low"}
    )
    assert (response.status, response.output_text) == ("completed", DESCRIPTION)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_streamed_response(client, items):
    with client.responses.stream(model="demo", input=items) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert deltas
    assert "".join(deltas) == response.output_text == DESCRIPTION


def test_responses_are_not_stored(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="demo", input="Go on.", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
