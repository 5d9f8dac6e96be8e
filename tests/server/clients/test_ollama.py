"""Ollama's package against a real server."""

import pytest

ollama = pytest.importorskip(
    "ollama", reason="the client packages are not installed; `make test-clients` installs them"
)

DESCRIBE = "Describe the shapes from left to right."
DESCRIPTION = "A green triangle, a black cross and a green cross."


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url, headers={"Authorization": f"Bearer {server.key}"})


def test_generate(client, image):
    answer = client.generate(model="demo", prompt=DESCRIBE, images=[image], think=False, options={"temperature": 0})
    assert (answer.response, answer.done, answer.done_reason) == (DESCRIPTION, True, "stop")
    assert answer.eval_count > 5
    assert 0 < answer.eval_duration < answer.total_duration


def test_generate_streamed(client, image):
    *parts, last = client.generate(model="demo", prompt=DESCRIBE, images=[image], stream=True)
    assert "".join(part.response for part in parts) == DESCRIPTION
    assert (last.response, last.done) == ("", True)


def test_chat(client, image):
    messages = [{"role": "user", "content": DESCRIBE, "images": [image]}]
    answer = client.chat(model="demo", messages=messages)
    assert (answer.message.role, answer.message.content) == ("assistant", DESCRIPTION)
    *parts, last = client.chat(model="demo", messages=messages, stream=True)
    assert "".join(part.message.content for part in parts) == DESCRIPTION
    assert last.eval_count == answer.eval_count


def test_the_models(client):
    (model,) = client.list().models
    assert model.model == "demo:latest"
    assert model.size > 1e6
    shown = client.show("demo")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo["fastvlm.context_length"] == 2048
    (running,) = client.ps().models
    assert (running.model, running.digest) == (model.model, model.digest)


def test_errors_are_ollamas(client):
    with pytest.raises(ollama.ResponseError, match="there is no model 'llava' here") as caught:
        client.generate(model="llava", prompt="Hello.")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="calls no tools"):
        client.chat(model="demo", messages=[{"role": "user", "content": "Hello."}], tools=[{"type": "function"}])
