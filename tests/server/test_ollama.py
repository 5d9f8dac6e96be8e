"""Ollama's API."""

import base64

import pytest

from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.ollama import Chat
from tests.server.conftest import SAMPLES, run

COUNT = "Count the shapes."
DESCRIBE = "Describe the shapes from left to right."
PICTURE = base64.b64encode((SAMPLES / "sample-1.png").read_bytes()).decode()


def generated(client, **body):
    return run(client.post("/api/generate", {"model": "demo", "prompt": DESCRIBE, **body}))


def chatted(client, *messages, **body):
    return run(client.post("/api/chat", {"model": "demo", "messages": messages, **body}))


def test_frigate_finds_the_model_and_asks_about_a_picture(serving, demo):
    options = {"temperature": 0, "repeat_penalty": 1.05, "presence_penalty": 0.3}
    with serving() as (client, service):
        service.parameters, service.size_bytes = 5_900_000, 11_800_000
        show = run(client.post("/api/show", {"model": "demo"})).json
        response = generated(client, images=[PICTURE], options=options, stream=False)
    assert show["details"]["family"] == "fastvlm"
    assert (show["details"]["parameter_size"], show["details"]["quantization_level"]) == ("5.9M", "F16")
    assert show["capabilities"] == ["completion", "vision"]
    assert show["model_info"]["fastvlm.context_length"] == 2048
    expected = generate(
        *demo,
        image=SAMPLES / "sample-1.png",
        prompt=DESCRIBE,
        repetition_penalty=1.05,
        presence_penalty=0.3,
        max_tokens=2048,
    )
    answer = response.json
    assert response.headers["content-type"] == "application/json"
    assert "x-fastvlm-warning" not in response.headers
    assert (answer["model"], answer["response"], answer["done"]) == ("demo", expected.text, True)
    assert answer["created_at"].endswith("Z")
    assert answer["done_reason"] == expected.finish_reason
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (expected.prompt_tokens, expected.generated_tokens)
    times = [answer[name] for name in ("total_duration", "prompt_eval_duration", "eval_duration", "load_duration")]
    assert all(isinstance(value, int) for value in times)
    assert 0 < times[1] < times[0] < 60e9  # nanoseconds


def test_an_answer_is_streamed_line_by_line_unless_stream_is_false(serving):
    with serving() as (client, _):
        whole = generated(client, images=[PICTURE], stream=False).json
        response = generated(client, images=[PICTURE])
        chat = chatted(client, {"role": "user", "content": DESCRIBE, "images": [PICTURE]})
    assert response.headers["content-type"] == "application/x-ndjson"
    *lines, last = response.lines
    assert lines
    assert all(line["done"] is False and line["response"] for line in lines)
    assert "".join(line["response"] for line in lines) == whole["response"]
    assert (last["response"], last["done"], last["done_reason"]) == ("", True, "stop")
    assert last.keys() == whole.keys()
    *messages, last = chat.lines
    assert "".join(line["message"]["content"] for line in messages) == whole["response"]
    assert {line["message"]["role"] for line in chat.lines} == {"assistant"}
    assert last["message"]["content"] == ""
    assert last["eval_count"] == whole["eval_count"]


def test_a_conversation_with_a_picture_is_continued(serving, demo):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": DESCRIBE, "images": [PICTURE]},
        {"role": "assistant", "content": "Three shapes.", "thinking": "Hm.", "mood": 3},
        {"role": "user", "content": COUNT},
    ]
    with serving() as (client, _):
        answer = chatted(client, *turns, stream=False, think=False, keep_alive="5m")
    messages = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "image", "path": SAMPLES / "sample-1.png"}, {"type": "text", "text": DESCRIBE}],
        },
        {"role": "assistant", "content": "Three shapes."},
        {"role": "user", "content": COUNT},
    ]
    expected = generate(*demo, prompt=messages)
    assert answer.json["message"] == {"role": "assistant", "content": expected.text}
    assert answer.json["prompt_eval_count"] == expected.prompt_tokens
    assert answer.headers["x-fastvlm-warning"] == "ignored: messages[2].mood"


def test_the_marks_that_frigate_puts_in_the_place_of_images_are_no_text(serving, demo):
    with serving() as (client, _):
        content = f"{COUNT}\n[img]\nThe second frame:\n[img]\nWrite [img] if unsure."
        answer = chatted(client, {"role": "user", "content": content, "images": [PICTURE, PICTURE]}, stream=False)
    text = f"{COUNT}\nThe second frame:\nWrite [img] if unsure."
    expected = generate(*demo, image=[SAMPLES / "sample-1.png"] * 2, prompt=text)
    assert answer.json["prompt_eval_count"] == expected.prompt_tokens
    assert answer.json["message"]["content"] == expected.text


def test_photoprisms_stop_string_and_a_system_text_count(serving, demo):
    with serving() as (client, _):
        answer = generated(
            client, images=[PICTURE], system="Be brief.", think=False, stream=False, options={"stop": ["\n\n", " and"]}
        ).json
    expected = generate(
        *demo, image=SAMPLES / "sample-1.png", prompt=DESCRIBE, system="Be brief.", stop=["\n\n", " and"]
    )
    assert expected.stop_string == " and"
    assert (answer["response"], answer["done_reason"]) == (expected.text, "stop")
    assert answer["prompt_eval_count"] == expected.prompt_tokens


@pytest.mark.parametrize(
    ("length", "tokens", "reason"), [(2, 2, "length"), (-1, 0, "stop"), (-2, 0, "stop"), (0, 0, "stop")]
)
def test_num_predict_below_one_sets_no_limit(serving, length, tokens, reason):
    with serving() as (client, _):
        unlimited = generated(client, images=[PICTURE], stream=False).json["eval_count"]
        answer = generated(client, images=[PICTURE], stream=False, options={"num_predict": length}).json
    assert (answer["eval_count"], answer["done_reason"]) == (tokens or unlimited, reason)


def test_the_same_seed_gives_the_same_answer(serving):
    options = {"temperature": 5.0, "top_p": 0.99, "top_k": 200, "min_p": 0.0, "num_predict": 12}
    with serving() as (client, _):
        answers = [
            generated(client, stream=False, options={**options, "seed": seed}).json["response"] for seed in (1, 1, 2)
        ]
    assert answers[0] == answers[1] != answers[2]


def test_options_of_the_machine_are_taken_silently_and_others_named(serving):
    with serving() as (client, _):
        silent = generated(client, options={"num_ctx": 4096, "num_gpu": 1, "num_thread": 4}, keep_alive=-1)
        named = generated(client, options={"mirostat": 1, "repeat_last_n": 64}, mood="good")
    assert (silent.status, named.status) == (200, 200)
    assert "x-fastvlm-warning" not in silent.headers
    assert named.headers["x-fastvlm-warning"] == "ignored: mood, options.mirostat, options.repeat_last_n"


def test_a_request_without_a_question_only_loads_the_model(serving):
    with serving() as (client, _):
        for response in (generated(client, prompt=""), chatted(client)):
            assert response.status == 200
            (line,) = response.lines
            assert (line["done"], line["done_reason"]) == (True, "load")
            assert line.get("response", line.get("message", {}).get("content")) == ""


def test_probabilities_come_with_the_text(serving):
    with serving() as (client, _):
        body = {"images": [PICTURE], "prompt": COUNT, "logprobs": True, "top_logprobs": 1}
        whole = generated(client, stream=False, **body).json
        lines = generated(client, **body).lines
    (token,) = whole["logprobs"]
    assert token["token"] == whole["response"] == token["top_logprobs"][0]["token"]
    assert [each for line in lines for each in line.get("logprobs", [])] == whole["logprobs"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("generate", {"model": ""}, 400, "model must be the model's name, not ''"),
        ("generate", {"model": "llava"}, 404, "there is no model 'llava' here; the one served is demo"),
        ("generate", {"raw": True}, 400, "raw is not supported: every prompt gets the model's template; leave it out"),
        ("generate", {"context": [1, 2]}, 400, "context is not supported: no tokens of earlier answers are taken"),
        ("generate", {"template": "{{ .Prompt }}"}, 400, "template is not supported"),
        ("generate", {"suffix": "."}, 400, "suffix is not supported"),
        ("generate", {"think": "low"}, 400, "think is not supported: the model answers without thinking aloud"),
        ("generate", {"format": "xml"}, 400, "format must be json or a JSON schema, not 'xml'"),
        ("generate", {"options": []}, 400, "options must be an object, not []"),
        ("generate", {"options": {"top_p": 2}}, 400, "options.top_p must be a number from 0 to 1, not 2"),
        ("generate", {"options": {"num_predict": -3}}, 400, "options.num_predict must be a whole number"),
        ("generate", {"images": [""]}, 400, "images[0] must be an image in base64, not ''"),
        ("generate", {"images": ["not base64!"]}, 400, "base64"),
        ("generate", {"images": ["/etc/passwd"]}, 400, ""),
        ("chat", {"messages": [{"role": "tool", "content": "3"}]}, 400, "messages[0].role must be one of"),
        ("chat", {"messages": [3]}, 400, "messages[0] must be an object, not 3"),
        ("chat", {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, 400, "calls no tools"),
        ("chat", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "calls no tools"),
        ("show", {"model": "llava"}, 404, "there is no model 'llava' here"),
        ("show", {"model": None}, 400, "model is missing; it must be the model's name"),
        ("pull", {}, 404, "there is nothing at /api/pull"),
    ],
)
def test_errors_have_ollamas_shape(serving, path, body, status, message):
    with serving() as (client, _):
        response = run(client.post(f"/api/{path}", {"model": "demo", "prompt": COUNT, **body}))
    assert response.status == status
    assert list(response.json) == ["error"]
    assert message in response.json["error"]


def test_an_error_in_a_stream_is_its_last_line():
    assert Chat().broken(ApiError(503, "the server is stopping")) == b'{"error":"the server is stopping"}\n'


def test_the_lists_of_models_have_the_one_that_is_served(serving):
    with serving() as (client, service):
        tags, running = (run(client.get(path)).json["models"] for path in ("/api/tags", "/api/ps"))
        version = run(client.get("/api/version")).json["version"]
        service.state = "loading"
        loading = [len(run(client.get(path)).json["models"]) for path in ("/api/tags", "/api/ps")]
    assert [each["name"] for each in tags] == ["demo:latest"]
    assert len(tags[0]["digest"]) == 64
    assert [each["model"] for each in running] == ["demo:latest"]
    assert (running[0]["digest"], running[0]["context_length"]) == (tags[0]["digest"], 2048)
    assert tuple(map(int, version.split("."))) > (0, 5)  # structured answers are asked for from 0.5 on
    assert loading == [1, 0]


def test_a_tag_is_part_of_the_name(serving):
    with serving() as (client, _):
        answer = run(client.post("/api/generate", {"model": "demo:latest", "prompt": COUNT, "stream": False}))
    assert (answer.status, answer.json["model"]) == (200, "demo:latest")
