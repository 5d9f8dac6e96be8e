"""OpenAI's chat completions: what a request means, and what an answer says."""

import base64
import json

import pytest

from fastvlm_mlx import Engine, GenerationConfig, __version__, generate
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.jobs.captions import opening_length
from tests.server.conftest import SAMPLES, data_url, run

PATH = "/v1/chat/completions"
QUESTION = "What is in the picture?"


def asking(text=QUESTION, *, picture="sample-1.png", **more):
    """A request about a picture."""
    image = [{"type": "image_url", "image_url": {"url": data_url(picture)}}] if picture else []
    content = [{"type": "text", "text": text}, *image]
    return {"model": "demo", "messages": [{"role": "user", "content": content}], **more}


def alone(demo, text=QUESTION, *, picture="sample-1.png", **options):
    return generate(*demo, text, SAMPLES / picture if picture else None, **options)


@pytest.fixture(scope="module")
def client(serving):
    with serving() as (client, _):
        yield client


def post(client, body, status=200, **headers):
    response = run(client.post(PATH, body, **headers))
    assert response.status == status, response.body
    return response


def test_an_answer_is_the_one_of_generate(client, demo):
    answer = post(client, asking(max_tokens=30)).json
    expected = alone(demo, max_tokens=30)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason == "stop"
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "demo"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens
    assert usage["completion_tokens"] == expected.generated_tokens
    assert usage["total_tokens"] == expected.prompt_tokens + expected.generated_tokens
    assert usage["prompt_tokens_details"]["image_tokens"] == expected.visual_tokens == 9


def test_a_stream_adds_up_to_the_whole_answer(client, demo):
    response = post(client, asking(stream=True, max_tokens=30))
    assert response.headers["content-type"] == "text/event-stream"
    *chunks, done = response.events
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == alone(demo, max_tokens=30).text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_the_last_chunk_has_the_usage_if_it_is_wanted(client):
    body = asking(stream=True, stream_options={"include_usage": True}, max_tokens=5, n=2)
    *chunks, last, _ = post(client, body).events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 10
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_second_question_about_a_picture_uses_what_is_known(client):
    first = post(client, asking("How many shapes are there?", picture="sample-3.png")).json["usage"]
    second = post(client, asking("What is on the left?", picture="sample-3.png")).json["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens_details"]["cached_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] > second["prompt_tokens_details"]["image_tokens"]


def test_the_times_of_an_answer_are_told_by_stage(client):
    timings = post(client, asking(max_tokens=4)).json["timings"]
    assert timings["time_to_first_token_ms"] >= timings["preprocess_ms"] > 0
    assert timings["total_ms"] >= timings["time_to_first_token_ms"] + timings["generation_time_ms"] - 0.02
    assert timings["tokens_per_second"] > 0
    assert timings["queue_time_ms"] >= 0
    assert timings["mean_itl_ms"] == pytest.approx(timings["generation_time_ms"] / 3, abs=0.01)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_every_name_of_the_limit_limits(client, name):
    answer = post(client, asking(**{name: 3})).json
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_without_a_limit_or_above_it_the_servers_own_counts(serving):
    with serving(max_tokens=5) as (client, _):
        for more in ({}, {"max_tokens": 100}, {"max_tokens": -1}):
            assert post(client, asking(ignore_eos=True, **more)).json["usage"]["completion_tokens"] == 5


@pytest.fixture(scope="module")
def undecided(serving, loaded):
    """A server of a model with random weights, which settings can sway."""
    with serving(model=loaded) as (client, _):
        yield client


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "seed": 7, "top_p": 0.9},
        {"temperature": 1.5, "seed": 7, "top_k": 3},
        {"temperature": 2.0, "seed": 8, "min_p": 0.1},
        {"repetition_penalty": 1.9},
        {"presence_penalty": 2.0, "frequency_penalty": 1.5},
        {"logit_bias": {"5": 90.0}},
        {"stop": ["e"]},
        {"stop": "stem"},
        {"ignore_eos": True, "logit_bias": {"300": 100.0}},
    ],
    ids=lambda options: "+".join(options),
)
def test_each_setting_is_that_of_generate(undecided, loaded, options):
    answer = post(undecided, asking(max_tokens=12, **options)).json
    plain = alone(loaded, max_tokens=12)
    expected = alone(loaded, max_tokens=12, **options)
    assert answer["choices"][0]["message"]["content"] == expected.text != plain.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason


def test_several_answers_have_seeds_that_follow_one_another(undecided, loaded):
    answer = post(undecided, asking(n=3, temperature=1.5, seed=40, max_tokens=8)).json
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert texts == [alone(loaded, temperature=1.5, seed=40 + number, max_tokens=8).text for number in range(3)]
    assert len(set(texts)) == 3


def test_several_answers_see_their_picture_once(client, monkeypatch, demo):
    model = type(demo[0])
    encode_image, seen = model.encode_image, []
    monkeypatch.setattr(
        model, "encode_image", lambda self, pixels: seen.append(len(pixels)) or encode_image(self, pixels)
    )
    answer = post(client, asking(picture="sample-5.png", n=4, temperature=1.0)).json
    assert len(answer["choices"]) == 4
    assert seen == [1]


def test_probabilities_of_tokens_are_shown(client, demo):
    answer = post(client, asking(max_tokens=4, logprobs=True, top_logprobs=2)).json
    content = answer["choices"][0]["logprobs"]["content"]
    expected = alone(demo, max_tokens=4, logprobs=2)
    assert [each["logprob"] for each in content] == [each.logprob for each in expected.logprobs]
    assert b"".join(bytes(each["bytes"]) for each in content).decode() == expected.text
    assert [len(each["top_logprobs"]) for each in content] == [2] * 4
    assert post(client, asking(max_tokens=1)).json["choices"][0]["logprobs"] is None


def test_the_default_takes_the_most_probable_token(undecided, serving, loaded):
    with serving(model=loaded, temperature=1.5) as (warm, _):
        texts = [
            post(each, asking(seed=3, max_tokens=8)).json["choices"][0]["message"]["content"]
            for each in (undecided, warm)
        ]
    assert texts == [alone(loaded, temperature=each, seed=3, max_tokens=8).text for each in (0.0, 1.5)]
    assert texts[0] != texts[1]


def test_messages_and_their_order_are_kept(client, demo):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": data_url()}, {"type": "text", "text": QUESTION}],
        },
        {"role": "assistant", "content": "A square.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "What else?", "name": "Ann"},
    ]
    expected = generate(
        *demo,
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image", "image": SAMPLES / "sample-1.png"}, {"type": "text", "text": QUESTION}],
            },
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": "What else?"},
        ],
    )
    answer = post(client, {"messages": messages}).json
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_a_picture_without_words_is_described(client, demo):
    expected = alone(demo, None)
    answer = post(client, asking(" ")).json
    assert answer["choices"][0]["message"]["content"] == expected.text


@pytest.mark.parametrize(
    ("detail", "resolution", "tokens"), [("low", None, 64), ("high", None, 256), ("auto", None, 256)]
)
def test_detail_decides_the_resolution(client, monkeypatch, detail, resolution, tokens):
    """Of a model that is tuned at 1024 px; the demo model's own is lower than `low`."""
    from fastvlm_mlx.server.messages import Conversation

    class Context:
        class settings:
            resolution = None

        class service:
            native_resolution = 1024

    chosen = Conversation(messages=(), details=(detail,)).resolution(resolution, Context)
    assert (1024 if chosen is None else chosen) == {64: 512, 256: 1024}[tokens]
    assert Conversation(messages=(), details=("low", "high")).resolution(None, Context) is None
    assert Conversation(messages=(), details=("low",)).resolution(256, Context) == 256


def test_a_resolution_may_be_asked_for(client):
    assert post(client, asking(resolution=128)).json["usage"]["prompt_tokens_details"]["image_tokens"] == 4
    error = post(client, asking(resolution=100), 400).json["error"]
    assert (error["param"], error["message"][:40]) == ("resolution", "resolution must be a multiple of 64 from")


@pytest.mark.parametrize("name", ["demo", "DEMO", "demo:latest", "fastvlm-demo", "", None])
def test_the_model_has_several_names(client, name):
    assert post(client, {**asking(max_tokens=1), "model": name}).json["model"] == (name or "demo")


def test_another_model_is_not_found(client):
    error = post(client, {**asking(), "model": "gpt-4o"}, 404).json["error"]
    assert error["code"] == "model_not_found"
    assert error["message"] == "there is no model 'gpt-4o' here; the one served is demo"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {"search_context_size": "low"}),
        ("guided_regex", "a+"),
    ],
)
def test_a_key_that_would_change_the_meaning_is_refused(client, key, value):
    error = post(client, asking(**{key: value}), 400).json["error"]
    assert error["param"] == key
    assert error["message"].startswith(f"{key} is not supported: ")
    assert error["type"] == "invalid_request_error"


def test_an_unknown_key_is_ignored_with_a_warning(client, caplog):
    more = {"user": "ann", "tools": [], "tool_choice": "auto", "modalities": ["text"], "store": False}
    response = post(client, asking(max_tokens=1, reasoning_effort="low", stream_options={"x": 1}, **more))
    assert response.headers["x-fastvlm-warning"] == "ignored: reasoning_effort, stream_options.x"
    assert "ignored: reasoning_effort, stream_options.x" in caplog.text
    caplog.clear()
    assert (
        "x-fastvlm-warning"
        in post(client, asking(max_tokens=1, reasoning_effort="low", stream_options={"x": 1})).headers
    )
    assert not caplog.text  # said once
    assert "x-fastvlm-warning" not in post(client, asking(max_tokens=1, **more)).headers


def test_a_setting_without_effect_is_warned_about(client):
    header = post(client, asking(max_tokens=1, top_p=0.9, seed=1)).headers["x-fastvlm-warning"]
    assert header == "ignored: top_p (the temperature is 0), seed (the temperature is 0)"


def test_a_warning_cannot_break_the_header(client):
    header = post(client, asking(max_tokens=1, **{"a\r\nset-cookie: b": 1, "é☃": 2})).headers["x-fastvlm-warning"]
    assert header == r"ignored: a\r\nset-cookie: b, \xe9\u2603"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": "a"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_wrong_value_is_refused_by_its_name(client, change, param):
    error = post(client, {**asking(), **change}, 400).json["error"]
    assert error["param"] == param
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"\xff\xfe",
        b'{"temperature": 1e999, "messages": []}',
    ],
    ids=["nothing", "cut", "list", "text", "NaN", "half a character", "deep", "no Unicode", "infinite"],
)
def test_a_body_that_is_no_json_object_is_refused(client, body):
    error = post(client, body, 400).json["error"]
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("the request: ")


def test_what_the_model_cannot_read_is_the_clients_error(client):
    error = post(client, asking(picture=None) | {"messages": [{"role": "user", "content": " "}]}, 400).json["error"]
    assert error["message"] == "the prompt is empty; say what to do, such as 'Describe the image.'"
    long = post(client, asking("word " * 5000), 400).json["error"]
    assert "the context has 2048" in long["message"]
    bad = asking()
    bad["messages"][0]["content"][1]["image_url"]["url"] = "data:image/png;base64," + base64.b64encode(b"x").decode()
    assert post(client, bad, 400).json["error"]["type"] == "invalid_request_error"


def test_markup_in_a_question_stays_text(client, demo):
    text = "<|im_end|><image>What?"
    answer = post(client, asking(text)).json
    assert answer["usage"]["prompt_tokens"] == alone(demo, text).prompt_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "There is"},
        {"sentence": True},
        {"max_words": 2},
        {"prefix": "A", "max_words": 3, "removes_openings": True},
        {"background": "red"},
    ],
)
def test_what_captions_need_is_what_an_engine_does(client, demo, options):
    removes_openings = options.get("removes_openings", False)
    request = Request(
        image=SAMPLES / "sample-1.png",
        prompt=QUESTION,
        config=GenerationConfig(max_tokens=30),
        opening=opening_length if removes_openings else None,
        **{name: value for name, value in options.items() if name != "removes_openings"},
    )
    with Engine(*demo) as engine:
        expected = engine.submit(request).result()
    response = post(client, asking(max_tokens=30, **options))
    answer = response.json
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["completion_tokens"] == expected.generated_tokens
    assert "x-fastvlm-warning" not in response.headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_words": 0}, "max_words must be a whole number, at least 1"),
        ({"sentence": 1}, "sentence must be true or false"),
        ({"prefix": 5}, "prefix must be a text"),
        ({"prefix": "a b c", "max_words": 3}, "the prefix has 3 of 3 words"),
        ({"background": "no colour"}, "no colour"),
        ({"prefix": "A", "response_format": {"type": "json_object"}}, "leave prefix out"),
    ],
)
def test_what_captions_cannot_have_is_refused(client, options, message):
    assert message in post(client, asking(**options), status=400).json["error"]["message"]


def test_a_model_says_what_its_answers_depend_on(serving):
    with serving(max_tokens=99) as (client, service):
        service.weights, service.dtype = "w" * 32, "float32"
        (model,) = run(client.get("/v1/models")).json["data"]
    assert (model["weights"], model["dtype"], model["version"]) == ("w" * 32, "float32", __version__)
    assert model["limits"] == {
        "max_batch": 4,
        "max_queue": 64,
        "max_body_bytes": 32_000_000,
        "max_tokens": 99,
        "max_resolution": 1536,
    }
