"""Questions with known answers, in the words of every API."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fastvlm_mlx
from fastvlm_mlx import GenerationConfig, generate, load

_PICTURES = sorted((Path(fastvlm_mlx.__file__).parent / "demo_model").glob("sample-*.png"))
_PROMPTS = ("What is in the picture?", "What does the text say?", "How many circles are there?", "Describe it.")
_SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square", "star"]}, "count": {"type": "integer"}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}
_APIS = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/generate", "/api/chat")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and what `generate` answers.

    Attributes:
        picture: Its file.
        prompt: Its text.
        settings: Fields of `GenerationConfig`.
        schema: What the answer has to be; None for text.
        text: The answer.
    """

    picture: Path
    prompt: str
    settings: dict[str, Any]
    schema: dict[str, Any] | None
    text: str


def questions(random: Random, number: int) -> list[Question]:
    """Random questions about the pictures of the demo model, each with settings of its own."""
    model, processor = load("demo", dtype="float32")
    made = []
    for _ in range(number):
        picture, prompt = random.choice(_PICTURES), random.choice(_PROMPTS)
        settings: dict[str, Any] = {"max_tokens": random.choice((3, 12, 40))}
        if random.random() < 0.5:
            settings |= {"temperature": 1.0, "seed": random.randrange(1000)}
            settings |= random.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        if random.random() < 0.3:
            settings["stop"] = (random.choice((".", " a", "circle")),)
        schema = _SCHEMA if random.random() < 0.2 else None
        if schema:
            settings.pop("stop", None)
        config = GenerationConfig(**settings)
        answer = generate(model, processor, image=picture, prompt=prompt, config=config, schema=schema)
        made.append(Question(picture=picture, prompt=prompt, settings=settings, schema=schema, text=answer.text))
    return made


def request(question: Question, random: Random) -> tuple[str, dict[str, Any]]:
    """The path and the body of a question, in the words of one API."""
    path, stream = random.choice(_APIS), random.random() < 0.5
    settings = {**question.settings, "stop": list(question.settings.get("stop", ()))}
    data = base64.b64encode(question.picture.read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    length, schema = settings.pop("max_tokens"), question.schema
    form = {"type": "json_schema", "name": "x", "schema": schema}
    if path == "/v1/chat/completions":
        parts = [{"type": "text", "text": question.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        more = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        body = {"messages": [_user(parts)], "stream": stream, "max_tokens": length, **settings}
        return path, {**body, **(more if schema else {})}
    if path == "/v1/responses":
        parts = [{"type": "input_text", "text": question.prompt}, {"type": "input_image", "image_url": url}]
        body = {"input": [_user(parts)], "stream": stream, "max_output_tokens": length, **settings}
        return path, {**body, **({"text": {"format": form}} if schema else {})}
    if path == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": data}
        parts = [{"type": "image", "source": source}, {"type": "text", "text": question.prompt}]
        stop = settings.pop("stop")
        body = {"messages": [_user(parts)], "stream": stream, "max_tokens": length, **settings}
        if schema:
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return path, {**body, **({"stop_sequences": stop} if stop else {})}
    options = {"options": {**settings, "num_predict": length}, "stream": stream, "model": "demo", "format": schema}
    if path == "/api/generate":
        return path, {"prompt": question.prompt, "images": [data], **options}
    return path, {"messages": [{**_user(question.prompt), "images": [data]}], **options}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text_of(path: str, stream: bool, body: bytes) -> str:
    """The text in an answer."""
    if not stream:
        return _piece(path, json.loads(body))
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith((b"data: {", b"{"))]
    return "".join(_piece(path, json.loads(line)) for line in lines)


def _piece(path: str, value: Any) -> str:
    """The text in one part of an answer, or in a whole one."""
    match value:
        case {"choices": [{"delta": delta}]}:
            return str(delta.get("content", ""))
        case (
            {"choices": [{"message": {"content": text}}]}
            | {"response": str(text)}
            | {"message": {"content": str(text)}}
        ):
            return str(text)
        case {"type": "response.output_text.delta", "delta": str(text)}:
            return text
        case {"object": "response", "output": [{"content": [{"text": str(text)}]}]}:
            return text
        case {"type": "message", "content": [{"text": str(text)}]}:
            return text
        case {"type": "content_block_delta", "delta": {"text": str(text)}}:
            return text
    return ""
