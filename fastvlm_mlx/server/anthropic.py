"""Anthropic's messages: `POST /v1/messages`, and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.api import ApiError, Context, Known, Question
from fastvlm_mlx.server.events import named_event
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.messages import Conversation, read_messages, read_resolution
from fastvlm_mlx.server.sampling import read_config
from fastvlm_mlx.server.schemas import read_schema, with_schema

MEANING = {
    "tools": "this server calls no tools",
    "mcp_servers": "this server calls no tools",
    "container": "this server runs no code",
}
_HARMLESS = ("metadata", "service_tier", "cache_control", "inference_geo", "speed")
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class _Anthropic:
    """What `Messages` and `CountTokens` share."""

    media_type = "text/event-stream"

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that an error has."""
        kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}

    def broken(self, error: ApiError) -> bytes:
        """The last part of a stream that an error ends."""
        return named_event("error", self.error(error))


class Messages(_Anthropic):
    """Anthropic's messages."""

    path = "/v1/messages"

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body."""
        fields = _fields(body)
        model = fields.text("model", "") or ""
        context.service.check(model)
        conversation = _read_conversation(fields, context)
        if fields.whole("max_tokens", least=1) is None:
            raise fields.wrong("max_tokens", "a whole number, at least 1")
        config = read_config(fields, context, limits=("max_tokens",), names={"stop": "stop_sequences"})
        request = Request(
            prompt=conversation.messages,
            allow=conversation.allow,
            resolution=conversation.resolution(read_resolution(fields, context), context),
            config=config,
        )
        return Question(
            requests=(with_schema(request, _read_schema(fields), "output_config.format"),),
            stream=fields.flag("stream"),
            model=model,
            warnings=(*fields.unknown(), *conversation.warnings),
        )

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of a whole answer."""
        (result,) = results
        return {
            **_head(question, context),
            "content": [{"type": "text", "text": result.text}],
            **_end(question, result),
            "usage": _usage(result, result.generated_tokens),
        }

    async def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer: Anthropic's events, from `message_start` to `message_stop`."""

        def event(name: str, **data: Any) -> bytes:
            return named_event(name, {"type": name, **data})

        begun = False
        async for _, piece in pieces:
            if not begun:
                begun = True
                nothing: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": _usage(piece, 0),
                }
                yield event("message_start", message={**_head(question, context), **nothing})
                yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
                yield event("ping")
            if piece.text:
                yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
            if piece.finish_reason is not None:
                yield event("content_block_stop", index=0)
                usage = _usage(piece, piece.generated_tokens)
                yield event("message_delta", delta=_end(question, piece), usage=usage)
                yield event("message_stop")


class CountTokens(_Anthropic, Known):
    """The tokens of a question, images included, without an answer to it."""

    path = "/v1/messages/count_tokens"

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body, counted."""
        fields = _fields(body)
        model = fields.text("model", "") or ""
        context.service.check(model)
        conversation = _read_conversation(fields, context)
        engine = context.service.engine
        assert engine is not None
        inputs = engine.processor.prepare(
            None,
            conversation.messages,
            resolution=conversation.resolution(read_resolution(fields, context), context),
            allow=conversation.allow,
        )
        ids = engine.processor.encode_turns(inputs.turns)
        return Question(
            requests=(),
            model=model,
            warnings=(*fields.unknown(), *conversation.warnings),
            options={"tokens": engine.processor.positions(ids, inputs.resolution)},
        )

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The number."""
        return {"input_tokens": question.options["tokens"]}


def _fields(body: Mapping[str, Any]) -> Fields:
    """The keys of a body, without those that mean nothing here."""
    fields = Fields(body)
    fields.refuse(MEANING)
    fields.ignore(*_HARMLESS)
    if fields.value("tool_choice") not in (None, {"type": "auto"}, {"type": "none"}):
        fields.refuse({"tool_choice": "this server calls no tools"})
    if body.get("thinking") == {"type": "disabled"}:
        fields.ignore("thinking")
    return fields


def _read_conversation(fields: Fields, context: Context) -> Conversation:
    """The system text and the messages of a request."""
    values = fields.array("messages")
    if not values:
        raise fields.wrong("messages", "a list of messages, with one at least")
    messages: list[dict[str, Any]] = []
    for number, value in enumerate(values):
        message = _message(value, f"messages[{number}]")
        if messages and messages[-1]["role"] == message["role"]:  # turns of one role count as one
            messages[-1]["content"] += message["content"]
        else:
            messages.append(message)
    if messages[-1]["role"] == "assistant":
        reason = "the last message must be the user's; the beginning of an answer cannot be given"
        raise ApiError(400, reason, param="messages", code="unsupported_content")
    system = fields.value("system")
    if system not in (None, "", []):
        messages.insert(0, {"role": "system", "content": _blocks(system, "system")})
    return read_messages(messages, context)


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message in OpenAI's shape."""
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object, not {shown(value)}", param=where, code="invalid_parameter")
    fields = Fields(value, f"{where}.")
    role = fields.text("role", among=("user", "assistant", "system"))
    if role is None or "content" not in fields:
        raise fields.wrong("content" if role else "role", "user or assistant, with a content")
    return {**value, "content": _blocks(fields.value("content"), f"{where}.content")}


def _blocks(value: Any, where: str) -> list[dict[str, Any]]:
    """The content of a message, a text or blocks, as OpenAI's parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ApiError(
            400,
            f"{where} must be a text or a list of blocks, not {shown(value)}",
            param=where,
            code="invalid_parameter",
        )
    parts = [_part(block, f"{where}[{number}]") for number, block in enumerate(value)]
    return [part for part in parts if part is not None]


def _part(block: Any, where: str) -> dict[str, Any] | None:
    """A block as a part; None if it is what a model has thought."""
    match block:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "source": {"type": "base64", "media_type": str(kind), "data": str(data)}}:
            return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return {"type": "image_url", "image_url": {"url": url}}
        case {"type": "thinking" | "redacted_thinking"}:
            return None
    raise ApiError(
        400,
        f"{where} must be a text block, or an image block with a base64 or url source, not {shown(block)}",
        param=where,
        code="unsupported_content",
    )


def _read_schema(fields: Fields) -> Any:
    """The schema that the answer must have, if any."""
    config = fields.object("output_config")
    form = config.object("format") if config is not None else fields.object("output_format")
    if form is None:
        return None
    if form.text("type", among=("json_schema",)) is None:
        raise form.wrong("type", '"json_schema"')
    return read_schema(form)


def _head(question: Question, context: Context) -> dict[str, Any]:
    return {
        "id": f"msg_{context.id}",
        "type": "message",
        "role": "assistant",
        "model": question.model or context.service.name,
    }


def _end(question: Question, result: GenerationResult) -> dict[str, Any]:
    """Why an answer ended."""
    reason = "end_turn"
    if result.stop_string is not None:
        reason = "stop_sequence"
    elif result.finish_reason == "length":
        is_limit = result.generated_tokens >= question.requests[0].config.max_tokens
        reason = "max_tokens" if is_limit else "model_context_window_exceeded"
    return {"stop_reason": reason, "stop_sequence": result.stop_string}


def _usage(result: GenerationResult, output_tokens: int) -> dict[str, int]:
    """Tokens; those read from the cache are not input tokens, as Anthropic counts."""
    return {
        "input_tokens": result.prompt_tokens - result.reused_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": result.reused_tokens,
        "output_tokens": output_tokens,
    }
