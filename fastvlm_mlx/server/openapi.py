"""The OpenAPI description of a server, at `/openapi.json`: what it serves, and in which shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastvlm_mlx import __version__
from fastvlm_mlx.server.openapi_schemas import ALBUM_SCHEMAS, PIXEL, SCHEMAS, ref
from fastvlm_mlx.server.settings import Settings

PATH = "/openapi.json"
_STREAM, _LINES = "text/event-stream", "application/x-ndjson"
_QUESTION = "What is in the picture?"
_PICTURE = PIXEL.partition(",")[2]

# What any request may get; the reasons are those of `guard`, `exchange` and `service`.
_REFUSALS = {
    400: "The request is wrong; the message says where.",
    401: "A key is needed, or the one given is wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "There is no such model or address.",
    405: "The address does not take this method.",
    431: "The headers are too large.",
}
_QUESTION_REFUSALS = {
    **_REFUSALS,
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to ask again.",
    503: "The model is loading, or the server is stopping or full; Retry-After says when to ask again.",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one address does.

    Attributes:
        summary: In a few words.
        tag: The API that it belongs to.
        answer: The schema of its answer; empty for a text.
        request: The schema of its body; empty if it is asked by GET.
        stream: The content type of its streams, or of the text.
        error: The schema of its errors.
        example: A body that gets an answer.
        statuses: Of answers with the schema, beside 200.
    """

    summary: str
    tag: str
    answer: str = ""
    request: str = ""
    stream: str = ""
    error: str = "OpenAIError"
    example: Any = None
    statuses: tuple[int, ...] = ()


_CHAT_EXAMPLE = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": _QUESTION}, {"type": "image_url", "image_url": {"url": PIXEL}}],
        }
    ],
    "max_tokens": 32,
}
_RESPONSES_EXAMPLE = {
    "input": [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": _QUESTION}, {"type": "input_image", "image_url": PIXEL}],
        }
    ],
    "max_output_tokens": 32,
}
_ANTHROPIC_EXAMPLE = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _PICTURE}},
                {"type": "text", "text": _QUESTION},
            ],
        }
    ]
}


def _operations(model: str) -> dict[str, Operation]:
    """The operations by path, with examples for a model."""
    ollama = {"model": model, "stream": False}
    return {
        "/v1/chat/completions": Operation(
            summary="Answer the last message of a conversation",
            tag="OpenAI",
            request="ChatRequest",
            answer="ChatAnswer",
            stream=_STREAM,
            example=_CHAT_EXAMPLE,
        ),
        "/v1/responses": Operation(
            summary="Answer the input; nothing is stored",
            tag="OpenAI",
            request="ResponsesRequest",
            answer="ResponsesAnswer",
            stream=_STREAM,
            example=_RESPONSES_EXAMPLE,
        ),
        "/v1/models": Operation(summary="List the model", tag="OpenAI", answer="Models"),
        "/v1/models/{name}": Operation(summary="Describe the model", tag="OpenAI", answer="Model"),
        "/v1/messages": Operation(
            summary="Answer the last message of a conversation",
            tag="Anthropic",
            request="MessagesRequest",
            answer="MessagesAnswer",
            stream=_STREAM,
            error="AnthropicError",
            example={**_ANTHROPIC_EXAMPLE, "max_tokens": 32},
        ),
        "/v1/messages/count_tokens": Operation(
            summary="Count the tokens of a question",
            tag="Anthropic",
            request="CountTokensRequest",
            answer="CountTokensAnswer",
            error="AnthropicError",
            example=_ANTHROPIC_EXAMPLE,
        ),
        "/api/generate": Operation(
            summary="Answer a prompt",
            tag="Ollama",
            request="GenerateRequest",
            answer="GenerateAnswer",
            stream=_LINES,
            error="OllamaError",
            example={**ollama, "prompt": _QUESTION, "images": [_PICTURE], "options": {"num_predict": 32}},
        ),
        "/api/chat": Operation(
            summary="Answer the last message of a conversation",
            tag="Ollama",
            request="OllamaChatRequest",
            answer="OllamaChatAnswer",
            stream=_LINES,
            error="OllamaError",
            example={
                **ollama,
                "messages": [{"role": "user", "content": _QUESTION, "images": [_PICTURE]}],
                "options": {"num_predict": 32},
            },
        ),
        "/api/show": Operation(
            summary="Describe the model",
            tag="Ollama",
            request="ShowRequest",
            answer="ShowAnswer",
            error="OllamaError",
            example={"model": model},
        ),
        "/api/tags": Operation(summary="List the model", tag="Ollama", answer="OllamaModels", error="OllamaError"),
        "/api/ps": Operation(summary="List the loaded model", tag="Ollama", answer="OllamaModels", error="OllamaError"),
        "/api/version": Operation(summary="Say the version", tag="Ollama", answer="Version", error="OllamaError"),
        "/album": Operation(summary="Say what the album holds", tag="Album", answer="AlbumStatus"),
        "/album/search": Operation(
            summary="Find pictures of the album; each line has all that is known so far",
            tag="Album",
            request="AlbumSearch",
            stream=_LINES,
            example={"query": "a red circle", "top": 20},
        ),
        "/album/thumbnails/{number}": Operation(summary="Show a picture, small", tag="Album", stream="image/jpeg"),
        "/album/pictures/{number}": Operation(summary="Show a picture", tag="Album", stream="image/jpeg"),
        "/health": Operation(summary="Say whether it lives", tag="Server", answer="Health", statuses=(503,)),
        "/ready": Operation(summary="Say whether it answers", tag="Server", answer="Ready", statuses=(503,)),
        "/metrics": Operation(summary="Count for Prometheus", tag="Server", stream="text/plain"),
        PATH: Operation(summary="Describe the server", tag="Server", answer="Description"),
        "/": Operation(summary="Show the page", tag="Server", stream="text/html"),
    }


def describe(settings: Settings, paths: Collection[str], model: str = "") -> dict[str, Any]:
    """The description of a server, in OpenAPI 3.1.

    Args:
        settings: Of the server.
        paths: What is served.
        model: Its name, for examples.
    """
    operations = _operations(model)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fastvlm-mlx",
            "version": __version__,
            "description": "Questions about images, answered by FastVLM: OpenAI's, Ollama's and Anthropic's requests. "
            "Keys that change nothing here are ignored, and named in the header x-fastvlm-warning.",
        },
        "servers": [{"url": "/"}],
        **({"security": [{name: []} for name in schemes]} if settings.api_keys else {}),
        "paths": {path: _path(path, operations[path]) for path in sorted(paths)},
        "components": {
            "schemas": {
                **SCHEMAS,
                **(ALBUM_SCHEMAS if "/album" in paths else {}),
                "Description": {"type": "object", "required": ["openapi", "info", "paths"]},
            },
            "securitySchemes": schemes,
        },
    }


def _path(path: str, operation: Operation) -> dict[str, Any]:
    """The path item of an operation."""
    described: dict[str, Any] = {
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_") or "page",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation),
    }
    for name, schema in (
        ("name", {"type": "string", "minLength": 1}),
        ("number", {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
    ):
        if f"{{{name}}}" in path:
            described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    if not operation.request:
        return {"get": described}
    body = {"schema": ref(operation.request), "example": operation.example}
    described["requestBody"] = {"required": True, "content": {"application/json": body}}
    return {"post": described}


def _responses(operation: Operation) -> dict[str, Any]:
    good: dict[str, Any] = {}
    if operation.answer:
        good["application/json"] = {"schema": ref(operation.answer)}
    if operation.stream:
        good[operation.stream] = {}  # JSON Schema describes no stream
    refusals = _QUESTION_REFUSALS if operation.request else _REFUSALS
    error = {"application/json": {"schema": ref(operation.error)}}
    return {
        **{str(status): {"description": text, "content": error} for status, text in refusals.items()},
        **{str(status): {"description": "See the answer.", "content": good} for status in (200, *operation.statuses)},
    }


def route(settings: Settings, paths: Sequence[str], model: str) -> Route:
    """The one address.

    Args:
        settings: Of the server.
        paths: The other addresses that are served, as Starlette writes them.
        model: Its name.
    """
    described = describe(settings, [*(path.replace(":path}", "}") for path in paths), PATH], model)

    async def description(_: Request) -> Response:
        """The description."""
        return JSONResponse(described)

    return Route(PATH, description)
