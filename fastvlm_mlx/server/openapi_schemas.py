"""The JSON schemas of the server's requests and answers, for its OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from fastvlm_mlx.inputs.resolution import MAX_RESOLUTION

Schema: TypeAlias = dict[str, Any]

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4IWcDAALUASNyYth2AAAAAElFTkSuQmCC"
)
"""A picture of one pixel, for examples."""


def ref(name: str) -> Schema:
    """A schema among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def _null(schema: Schema) -> Schema:
    """A schema, or null, which counts as absent."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _object(needed: Mapping[str, Schema] | None = None, **optional: Schema) -> Schema:
    """An object with keys that it must have, others that may be null, and any others, which are ignored."""
    needed = needed or {}
    properties = {**needed, **{name: _null(schema) for name, schema in optional.items()}}
    return {"type": "object", "properties": properties, **({"required": list(needed)} if needed else {})}


def _answer(**properties: Schema) -> Schema:
    """An object of an answer: all its keys are there."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _number(least: float | None = None, most: float | None = None, **more: Any) -> Schema:
    bounds = {"minimum": least, "maximum": most}
    return {"type": "number", **{name: value for name, value in bounds.items() if value is not None}, **more}


def _whole(least: int | None = None, most: int | None = None, **more: Any) -> Schema:
    return {**_number(least, most), "type": "integer", **more}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_ANY_OBJECT: Schema = {"type": "object"}
_COUNT = _whole(0)
_TEXTS: Schema = {
    "anyOf": [{"type": "string", "minLength": 1}, _array({"type": "string", "minLength": 1}, maxItems=16)]
}
_LIMIT = _whole(-1, description="The most tokens of the answer; -1 for the server's own limit.")
_IMAGE_URL: Schema = {
    "type": "string",
    "description": "A data: URL of an image or a PDF, each page of which is an image. An http or https URL, or a file: "
    "URL or path, only where the server allows it.",
    "examples": [PIXEL],
}
_BASE64: Schema = {"type": "string", "description": "An image in base64.", "examples": [PIXEL.partition(",")[2]]}
_DETAIL = _one_of("auto", "low", "high", "original")
_RESOLUTION: Schema = {
    "anyOf": [
        {"type": "integer", "multipleOf": 64, "minimum": 64, "maximum": MAX_RESOLUTION},
        {"type": "string", "pattern": "^auto(:([1-9]|[1-5][0-9]|6[0-4]))?$"},
    ],
    "description": "Pixels per side that images are resized to, a multiple of 64; or auto, as few as do not shrink "
    "the images, or auto:PIXELS with the pixels for a detail and the gap beside it. An extension of this server.",
}

_PENALTIES: dict[str, Schema] = {"presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2)}
_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 100, description="0, the default unless the server has another, is deterministic."),
    "top_p": _number(0, 1),
    "top_k": _whole(-1),
    "min_p": _number(0, 1),
    "seed": _whole(-1, 2**64 - 1),
    "logit_bias": {"type": "object", "patternProperties": {"^[0-9]{1,9}$": _null(_number(-100, 100))}},
}
_OPENAI_SAMPLING: dict[str, Schema] = {
    **_SAMPLING,
    **_PENALTIES,
    "repetition_penalty": _number(None, 100, exclusiveMinimum=0),
    "stop": _TEXTS,
    "resolution": _RESOLUTION,
}
_CAPTION: dict[str, Schema] = {
    "prefix": {"type": "string", "description": "What the answer begins with. An extension, as are those below."},
    "sentence": {"type": "boolean", "description": "Whether the answer ends after its first sentence."},
    "max_words": _whole(1, description="The most words of the answer; of Chinese and Japanese, characters."),
    "removes_openings": {
        "type": "boolean",
        "description": "Whether the client will remove a phrase such as 'The image shows', whose words then do not "
        "count in max_words; it is in the answer.",
    },
    "background": {"type": "string", "description": "The colour under transparent pixels, such as white or #808080."},
}
_LOGPROBS: dict[str, Schema] = {"logprobs": _FLAG, "top_logprobs": _whole(0, 20)}


def _tagged(kind: str, **keys: Schema) -> Schema:
    """An object with its kind, and keys that it must have."""
    return _object({"type": {"const": kind}, **keys})


_PART: Schema = {
    "anyOf": [
        _object({"type": _one_of("text", "input_text", "output_text"), "text": _TEXT}),
        _object(
            {
                "type": _one_of("image_url", "input_image"),
                "image_url": {"anyOf": [_IMAGE_URL, _object({"url": _IMAGE_URL}, detail=_DETAIL)]},
            },
            detail=_DETAIL,
        ),
    ]
}
_CONTENT: Schema = {"anyOf": [_TEXT, _array(ref("Part"))]}
_BLOCK: Schema = {
    "anyOf": [
        _tagged("text", text=_TEXT),
        _tagged("image", source=_tagged("base64", media_type=_TEXT, data=_BASE64)),
        _tagged("image", source=_tagged("url", url=_IMAGE_URL)),
    ]
}
_BLOCKS: Schema = {"anyOf": [_TEXT, _array(ref("Block"))]}
_RESPONSE_FORMAT: Schema = {
    "anyOf": [
        _tagged("text"),
        _tagged("json_object"),
        _tagged("json_schema", json_schema=_object({"schema": _ANY_OBJECT}, name=_TEXT, strict=_FLAG)),
    ]
}
_TEXT_FORMAT: Schema = {"anyOf": [_tagged("text"), _tagged("json_object"), _tagged("json_schema", schema=_ANY_OBJECT)]}
_OLLAMA: dict[str, Schema] = {
    "stream": _FLAG,
    "format": {"anyOf": [_one_of("json", ""), _ANY_OBJECT]},
    "options": _object(
        **_SAMPLING,
        **_PENALTIES,
        repeat_penalty=_number(None, 100, exclusiveMinimum=0),
        stop=_TEXTS,
        num_predict=_whole(-2),
    ),
    "resolution": _RESOLUTION,
    **_LOGPROBS,
}
_ANTHROPIC: dict[str, Schema] = {"system": _BLOCKS, "model": _TEXT, "resolution": _RESOLUTION}
_ANTHROPIC_MESSAGES = _array(_object({"role": _one_of("user", "assistant", "system"), "content": _BLOCKS}), minItems=1)

_USAGE = _answer(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_answer(cached_tokens=_COUNT, image_tokens=_COUNT),
)
_MODEL = _answer(
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    system_fingerprint=_null(_TEXT),
    weights=_null(_TEXT),
    dtype=_null(_TEXT),
    version=_TEXT,
    limits=_answer(max_batch=_COUNT, max_queue=_COUNT, max_body_bytes=_COUNT, max_tokens=_COUNT, max_resolution=_COUNT),
)
_OLLAMA_MODELS = _answer(models=_array(_answer(name=_TEXT, model=_TEXT, details=_ANY_OBJECT)))

SCHEMAS: dict[str, Schema] = {
    "Part": _PART,
    "Block": _BLOCK,
    "ChatRequest": _object(
        {
            "messages": _array(
                _object({"role": _one_of("system", "developer", "user", "assistant"), "content": _CONTENT}),
                minItems=1,
            )
        },
        model=_TEXT,
        max_tokens=_LIMIT,
        max_completion_tokens=_LIMIT,
        n=_whole(1),
        stream=_FLAG,
        stream_options=_object(include_usage=_FLAG),
        response_format=_RESPONSE_FORMAT,
        **_LOGPROBS,
        **_OPENAI_SAMPLING,
        **_CAPTION,
    ),
    "ChatAnswer": _answer(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_array(
            _answer(
                index=_COUNT,
                message=_answer(role={"const": "assistant"}, content=_TEXT),
                finish_reason=_one_of("stop", "length"),
            )
        ),
        usage=_USAGE,
        timings=_ANY_OBJECT,
    ),
    "ResponsesRequest": _object(
        {
            "input": {
                "anyOf": [
                    _TEXT,
                    _array(
                        _object({"role": _one_of("system", "developer", "user", "assistant"), "content": _CONTENT}),
                        minItems=1,
                    ),
                ]
            }
        },
        model=_TEXT,
        instructions=_TEXT,
        max_output_tokens=_LIMIT,
        stream=_FLAG,
        text=_object(format=_TEXT_FORMAT),
        include=_TEXTS,
        top_logprobs=_whole(0, 20),
        **_OPENAI_SAMPLING,
    ),
    "ResponsesAnswer": _answer(
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        status=_one_of("completed", "incomplete"),
        model=_TEXT,
        output=_array(
            _answer(type={"const": "message"}, content=_array(_answer(type={"const": "output_text"}, text=_TEXT)))
        ),
        usage=_answer(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "MessagesRequest": _object(
        {"messages": _ANTHROPIC_MESSAGES, "max_tokens": _whole(1)},
        stream=_FLAG,
        stop_sequences=_TEXTS,
        output_config=_object(format=_object({"type": {"const": "json_schema"}, "schema": _ANY_OBJECT})),
        **_ANTHROPIC,
        **_SAMPLING,
    ),
    "MessagesAnswer": _answer(
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        model=_TEXT,
        content=_array(_answer(type={"const": "text"}, text=_TEXT)),
        stop_reason=_one_of("end_turn", "stop_sequence", "max_tokens", "model_context_window_exceeded"),
        usage=_answer(input_tokens=_COUNT, output_tokens=_COUNT, cache_read_input_tokens=_COUNT),
    ),
    "CountTokensRequest": _object({"messages": _ANTHROPIC_MESSAGES}, **_ANTHROPIC),
    "CountTokensAnswer": _answer(input_tokens=_COUNT),
    "GenerateRequest": _object({"model": _TEXT}, prompt=_TEXT, system=_TEXT, images=_array(_BASE64), **_OLLAMA),
    "GenerateAnswer": _answer(model=_TEXT, created_at=_TEXT, response=_TEXT, done=_FLAG),
    "OllamaChatRequest": _object(
        {"model": _TEXT},
        messages=_array(
            _object({"role": _one_of("system", "user", "assistant")}, content=_TEXT, images=_array(_BASE64))
        ),
        **_OLLAMA,
    ),
    "OllamaChatAnswer": _answer(
        model=_TEXT, created_at=_TEXT, message=_answer(role={"const": "assistant"}, content=_TEXT), done=_FLAG
    ),
    "ShowRequest": _object({"model": _TEXT}, verbose={}),
    "ShowAnswer": _answer(details=_ANY_OBJECT, model_info=_ANY_OBJECT, capabilities=_array(_TEXT)),
    "OllamaModels": _OLLAMA_MODELS,
    "Version": _answer(version=_TEXT),
    "Model": _MODEL,
    "Models": _answer(object={"const": "list"}, data=_array(ref("Model"))),
    "Health": _answer(status=_one_of("ok", "failed"), state=_TEXT, step_seconds=_number(0), requests=_COUNT),
    "Ready": _answer(ready=_FLAG, state=_TEXT, detail=_TEXT),
    "OpenAIError": _answer(
        error=_answer(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    ),
    "OllamaError": _answer(error=_TEXT),
    "AnthropicError": _answer(type={"const": "error"}, error=_answer(type=_TEXT, message=_TEXT)),
}

ALBUM_SCHEMAS: dict[str, Schema] = {
    "AlbumStatus": _answer(
        name=_TEXT,
        pictures=_COUNT,
        state=_one_of("waiting", "looking", "indexing", "ready", "elsewhere", "missing", "failed"),
        done=_COUNT,
        total=_COUNT,
        failed=_COUNT,
        error=_TEXT,
    ),
    "AlbumSearch": _object(
        {"query": {"type": "string", "minLength": 1, "maxLength": 1000, "pattern": r"\S"}},
        top=_whole(1, 500, description="The most pictures of a line; 100 by default."),
        threshold=_number(0, 1, description="The least score; 0.5 by default."),
        since={"type": "string", "format": "date", "description": "Only pictures of this day or later."},
        words={"type": "boolean", "description": "Look for words in captions and names; ask the model nothing."},
    ),
}
"""Of a server with an album."""
