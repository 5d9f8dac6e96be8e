"""Requests as applications send them: Frigate, ha-llmvision, Home Assistant, Open WebUI; and all APIs at once."""

import asyncio
import base64
import random

import pytest

from fastvlm_mlx.generation.generate import generate
from tests import pdfs
from tests.server.conftest import SAMPLES, data_url, run

CHAT = "/v1/chat/completions"
DESCRIBE = "Describe the shapes from left to right."
COUNT = "Count the shapes."


def text_part(text):
    return {"type": "text", "text": text}


def image_part(name, **more):
    return {"type": "image_url", "image_url": {"url": data_url(name), **more}}


def picture(name):
    return {"type": "image", "path": SAMPLES / name}


def test_frigate_reads_the_context_and_shows_three_frames_after_its_words(serving, demo):
    names = ["sample-1.png", "sample-2.png", "sample-3.png"]
    frames = [image_part(name, detail="low") for name in names]
    body = {"model": "demo", "messages": [{"role": "user", "content": [text_part(COUNT), *frames]}], "timeout": 60}
    with serving() as (client, _):
        models = run(client.get("/v1/models")).json
        response = run(client.post(CHAT, body))
    assert models["data"][0]["max_model_len"] == 2048
    expected = generate(*demo, image=[SAMPLES / name for name in names], prompt=COUNT)
    assert response.json["choices"][0]["message"]["content"] == expected.text
    assert response.json["usage"]["prompt_tokens_details"]["image_tokens"] == expected.visual_tokens == 27
    assert response.headers["x-fastvlm-warning"] == "ignored: timeout"


def test_ha_llmvision_names_each_picture_before_it(serving, demo):
    content = []
    for number, name in enumerate(["sample-1.png", "sample-2.png"], 1):
        content += [text_part(f"Image {number}:"), image_part(name)]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": [*content, text_part(COUNT)]}],
        "max_tokens": 20,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    with serving() as (client, _):
        answer = run(client.post(CHAT, {**body, "seed": 3})).json
        wrong = run(client.post(CHAT, {**body, "max_tokens": "many"}))
    images = [SAMPLES / "sample-1.png", SAMPLES / "sample-2.png"]
    options = {"max_tokens": 20, "temperature": 0.2, "top_p": 0.9, "seed": 3}
    expected = generate(*demo, image=images, prompt=f"Image 1:\nImage 2:\n{COUNT}", **options)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert "max_tokens must be a whole number" in wrong.json["error"]["message"]


def test_home_assistant_sends_a_document(serving):
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    url = "data:application/pdf;base64," + base64.b64encode(pdfs.pdf([(1, 0, 0), (0, 0, 1)])).decode()
    content = [text_part("What does it show?"), {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "demo", "user": "me", "messages": [{"role": "user", "content": content}]}
    with serving() as (client, _):
        response = run(client.post(CHAT, body))
    assert response.status == 200, response.json
    assert response.json["usage"]["prompt_tokens"] > 2 * 9


def test_open_webui_asks_for_a_title_and_tags_while_a_picture_is_described(serving):
    shown = {"role": "user", "content": [text_part(DESCRIBE), image_part("sample-1.png")]}
    title = {"role": "user", "content": 'Write a title of 3 to 5 words, as JSON: { "title": "…" }'}
    tags = {"role": "user", "content": 'Write 1 to 3 tags, as JSON: { "tags": ["…"] }'}
    bodies = [
        {"model": "demo", "stream": True, "messages": [shown]},
        {"model": "demo", "stream": False, "messages": [title], "max_completion_tokens": 40},
        {"model": "demo", "stream": False, "messages": [tags], "max_completion_tokens": 30},
    ]
    with serving() as (client, _):
        alone = [answer_text(run(client.post(CHAT, body))) for body in bodies]

        async def together():
            return await asyncio.gather(*(client.post(CHAT, body) for body in bodies))

        for _ in range(3):
            assert [answer_text(response) for response in run(together())] == alone


def answer_text(response):
    """The text of an answer, of whatever API, whole or streamed."""
    assert response.status == 200, response.body
    kind = response.headers["content-type"]
    if kind == "application/x-ndjson":
        return "".join(line.get("response", line.get("message", {}).get("content")) for line in response.lines)
    if kind == "text/event-stream" and response.body.startswith(b"event: response"):
        return response.named_events[-1][1]["response"]["output"][0]["content"][0]["text"]
    if kind == "text/event-stream" and response.body.startswith(b"event: message"):
        return "".join(data["delta"]["text"] for name, data in response.named_events if name == "content_block_delta")
    if kind == "text/event-stream":
        chunks = [event["choices"][0]["delta"] for event in response.events if event != "[DONE]"]
        return "".join(delta.get("content", "") for delta in chunks)
    match response.json:
        case {"choices": [{"message": {"content": text}}]}:
            return text
        case {"output": [{"content": [{"text": text}]}]}:
            return text
        case {"content": [{"text": text}]} | {"message": {"content": text}} | {"response": text}:
            return text
    raise AssertionError(response.body)


def random_request(draw):
    """A path, a body, and the arguments with which `generate` gives the same answer."""
    name = draw.choice([None, "sample-1.png", "sample-2.png", "sample-4.png"])
    question = draw.choice([DESCRIBE, COUNT, "What does the text say?"])
    options = {
        "temperature": draw.choice([0.0, 0.7, 2.5]),
        "top_p": draw.choice([1.0, 0.8]),
        "top_k": draw.choice([0, 12]),
        "max_tokens": draw.choice([2, 9, 40]),
        "seed": draw.randrange(100),
        "stop": draw.choice([(), (" and",), ("a", "e")]),
    }
    stop, limit = list(options["stop"]), options["max_tokens"]
    sampling = {key: options[key] for key in ("temperature", "top_p", "top_k", "seed")}
    common = {"model": "demo", "stream": draw.choice([False, True])}
    image = [image_part(name)] if name else []
    data = base64.b64encode((SAMPLES / name).read_bytes()).decode() if name else ""
    turn = {"role": "user", "content": [text_part(question), *image]}
    parts = [{"type": "input_text", "text": question}]
    parts += [{"type": "input_image", "image_url": data_url(name)}] if name else []
    blocks = [text_part(question)]
    blocks += [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}] if name else []
    local = {"options": {**sampling, "stop": stop, "num_predict": limit}}
    images = {"images": [data]} if name else {}
    path, body = draw.choice(
        [
            (CHAT, {"messages": [turn], **sampling, "stop": stop, "max_tokens": limit}),
            (
                "/v1/responses",
                {"input": [{"role": "user", "content": parts}], **sampling, "stop": stop, "max_output_tokens": limit},
            ),
            (
                "/v1/messages",
                {
                    "messages": [{"role": "user", "content": blocks}],
                    **sampling,
                    "stop_sequences": stop,
                    "max_tokens": limit,
                },
            ),
            ("/api/generate", {"prompt": question, **images, **local}),
            ("/api/chat", {"messages": [{"role": "user", "content": question, **images}], **local}),
        ]
    )
    return path, {**common, **body}, {"prompt": question, "image": SAMPLES / name if name else None, **options}


@pytest.mark.parametrize("seed", range(2))
def test_every_api_at_once_gives_each_request_its_own_answer(serving, demo, seed):
    draw = random.Random(seed)
    requests = [random_request(draw) for _ in range(10)]

    async def ask(client, path, body, delay):
        await asyncio.sleep(delay)
        return await client.post(path, body)

    async def together(client):
        delays = [draw.random() / 5 for _ in requests]
        calls = [ask(client, path, body, delay) for (path, body, _), delay in zip(requests, delays, strict=True)]
        return await asyncio.gather(*calls)

    with serving(max_batch=4) as (client, _):
        responses = run(together(client))
    for response, (path, _, arguments) in zip(responses, requests, strict=True):
        assert answer_text(response) == generate(*demo, **arguments).text, path
