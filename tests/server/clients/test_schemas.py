"""Answers in the form of a JSON schema, as each client package asks for them."""

import base64
import json
from typing import Literal

import pytest

REASON = "the client packages are not installed; `make test-clients` installs them"
openai = pytest.importorskip("openai", reason=REASON)
anthropic = pytest.importorskip("anthropic", reason=REASON)
ollama = pytest.importorskip("ollama", reason=REASON)
langchain_openai = pytest.importorskip("langchain_openai", reason=REASON)

DESCRIBE = "Describe the shapes from left to right."
ANIMAL = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def check(text):
    value = json.loads(text)
    assert value.keys() == {"name", "legs"}
    assert isinstance(value["name"], str)
    assert value["legs"] in range(9)


def test_openais_chat(server, image_url):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)
    content = [{"type": "text", "text": DESCRIBE}, {"type": "image_url", "image_url": {"url": image_url}}]
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": ANIMAL}},
    )
    check(answer.choices[0].message.content)


def test_openais_chat_parses_into_a_model(server):
    pydantic = pytest.importorskip("pydantic")

    class Animal(pydantic.BaseModel):
        """An animal."""

        name: str = pydantic.Field(max_length=8)
        kind: Literal["dog", "cat"]
        tags: list[Literal["old", "young"]] = pydantic.Field(max_length=2)
        legs: int | None = pydantic.Field(ge=0, le=8)

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)
    messages = [{"role": "user", "content": "Describe an animal."}]
    answer = client.chat.completions.parse(model="demo", messages=messages, response_format=Animal)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    response = client.responses.parse(model="demo", input="Describe an animal.", text_format=Animal)
    assert isinstance(response.output_parsed, Animal)


def test_openais_responses(server, image_url):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)
    content = [{"type": "input_text", "text": DESCRIBE}, {"type": "input_image", "image_url": image_url}]
    response = client.responses.create(
        model="demo",
        input=[{"role": "user", "content": content}],
        text={"format": {"type": "json_schema", "name": "animal", "strict": True, "schema": ANIMAL}},
    )
    check(response.output_text)


def test_anthropics_messages(server, image):
    client = anthropic.Anthropic(base_url=server.url, api_key=server.key)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": DESCRIBE}]
    message = client.messages.create(
        model="demo",
        max_tokens=200,
        messages=[{"role": "user", "content": content}],
        output_config={"format": {"type": "json_schema", "schema": ANIMAL}},
    )
    check(message.content[0].text)


def test_ollamas_chat(server, image):
    client = ollama.Client(host=server.url, headers={"Authorization": f"Bearer {server.key}"})
    messages = [{"role": "user", "content": DESCRIBE, "images": [image]}]
    check(client.chat(model="demo", messages=messages, format=ANIMAL).message.content)
    value = json.loads(client.generate(model="demo", prompt=DESCRIBE, images=[image], format="json").response)
    assert isinstance(value, dict)


def test_langchains_structured_output(server, image_url):
    chat = langchain_openai.ChatOpenAI(base_url=f"{server.url}/v1", api_key=server.key, model="demo")
    content = [{"type": "text", "text": DESCRIBE}, {"type": "image_url", "image_url": {"url": image_url}}]
    schema = {"title": "animal", **ANIMAL}
    value = chat.with_structured_output(schema, method="json_schema").invoke([("user", content)])
    check(json.dumps(value))
