"""OpenAI's responses: `POST /v1/responses`. Nothing is stored: every request brings the whole conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.api import ApiError, Context, Question, openai_error
from fastvlm_mlx.server.events import named_event
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.logprobs import shown_logprobs
from fastvlm_mlx.server.messages import Conversation, read_messages, read_resolution
from fastvlm_mlx.server.openai_chat import timings
from fastvlm_mlx.server.sampling import read_config
from fastvlm_mlx.server.schemas import read_format, with_schema

MEANING = {
    "previous_response_id": "no answer is stored; send the whole conversation as input",
    "conversation": "no conversation is stored; send all of it as input",
    "background": "every answer is sent at once",
    "prompt": "no prompts are stored",
    "tools": "this server calls no tools",
}
_HARMLESS = (
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "max_tool_calls",
    "parallel_tool_calls",
    "stream_options",
)
_WITH_LOGPROBS = "message.output_text.logprobs"


class Responses:
    """OpenAI's responses."""

    path = "/v1/responses"
    media_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body."""
        fields = Fields(body)
        model = fields.text("model", "") or ""
        context.service.check(model)
        fields.refuse(MEANING)
        fields.ignore(*_HARMLESS)
        if fields.value("tool_choice") not in (None, "none", "auto"):
            fields.refuse({"tool_choice": "this server calls no tools"})
        instructions = fields.text("instructions")
        conversation, ignored = _read_input(fields, instructions, context)
        echo = {
            "instructions": instructions,
            "max_output_tokens": fields.whole("max_output_tokens", least=1),
            "metadata": _read_metadata(fields),
        }
        stored = ("store",) if fields.flag("store") else ()
        cut = ("truncation",) if fields.text("truncation", among=("auto", "disabled")) == "auto" else ()
        include = fields.texts("include")
        left_out = ("include",) if set(include) - {_WITH_LOGPROBS} else ()
        top = fields.whole("top_logprobs", least=0, most=20)
        logprobs = (top or 0) if top or _WITH_LOGPROBS in include else None
        form, schema = _read_format(fields)
        config = read_config(fields, context, limits=("max_output_tokens",), logprobs=logprobs)
        request = Request(
            prompt=conversation.messages,
            allow=conversation.allow,
            resolution=conversation.resolution(read_resolution(fields, context), context),
            config=config,
        )
        return Question(
            requests=(with_schema(request, schema, "text.format"),),
            stream=fields.flag("stream"),
            model=model,
            warnings=(*stored, *cut, *left_out, *ignored, *fields.unknown(), *conversation.warnings),
            options={**echo, "temperature": config.temperature, "top_p": config.top_p, "text": {"format": form}},
        )

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of a whole answer."""
        (result,) = results
        part = _part(result.text, shown_logprobs(result, context))
        return _response(question, context, result, [_message(context, result, part)])

    async def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer: OpenAI's events, from `response.created` to `response.completed`."""
        number = -1

        def event(name: str, **data: Any) -> bytes:
            nonlocal number
            number += 1
            return named_event(name, {"type": name, "sequence_number": number, **data})

        place = {"item_id": _item_id(context), "output_index": 0, "content_index": 0}
        text, latest = "", None
        logprobs: list[dict[str, Any]] = []
        try:
            async for _, piece in pieces:
                if latest is None:
                    response = _response(question, context, None, [])
                    yield event("response.created", response=response)
                    yield event("response.in_progress", response=response)
                    yield event("response.output_item.added", output_index=0, item=_message(context, None))
                    yield event("response.content_part.added", **place, part=_part("", []))
                latest = piece
                shown = shown_logprobs(piece, context)
                text, logprobs = text + piece.text, logprobs + shown
                if piece.text or shown:
                    yield event("response.output_text.delta", **place, delta=piece.text, logprobs=shown)
        except FastVLMError as error:
            if latest is not None:
                failed = {**_response(question, context, None, []), "status": "failed", "error": _failure(error)}
                yield event("response.failed", response=failed)
            raise
        part = _part(text, logprobs)
        item = _message(context, latest, part)
        yield event("response.output_text.done", **place, text=text, logprobs=logprobs)
        yield event("response.content_part.done", **place, part=part)
        yield event("response.output_item.done", output_index=0, item=item)
        response = _response(question, context, latest, [item])
        yield event(f"response.{response['status']}", response=response)

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that an error has."""
        return openai_error(error)

    def broken(self, error: ApiError) -> bytes:
        """Nothing: the stream has said itself that it failed."""
        return b""


def _read_input(fields: Fields, instructions: str | None, context: Context) -> tuple[Conversation, tuple[str, ...]]:
    """The conversation of a request, and the items of its input that were left out."""
    value, ignored = fields.value("input"), []
    if isinstance(value, str):
        items: list[Any] = [{"role": "user", "content": value}]
    elif isinstance(value, list):
        items = []
        for number, item in enumerate(value):
            where = f"input[{number}]"
            if _kind(item) == "reasoning":
                ignored.append(where)
            else:
                items.append(_as_message(item, where))
    else:
        raise fields.wrong("input", "a text or a list of messages")
    if instructions:
        items.insert(0, {"role": "system", "content": instructions})
    return read_messages(items, context, "input"), tuple(ignored)


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else "message"


def _as_message(item: Any, where: str) -> Any:
    """An item of the input as a message of chat completions, without the keys that only answers have."""
    if _kind(item) != "message":
        raise ApiError(
            400,
            f"{where}.type must be message, not {shown(_kind(item))}; no tools are called and nothing is stored here",
            param=f"{where}.type",
            code="unsupported_content",
        )
    return {key: item[key] for key in item if key not in ("type", "id", "status")} if isinstance(item, dict) else item


def _read_metadata(fields: Fields) -> dict[str, Any]:
    """What the client wants to find again in the answer."""
    metadata = fields.value("metadata")
    if not isinstance(metadata, dict | None):
        raise fields.wrong("metadata", "an object")
    return metadata or {}


def _read_format(fields: Fields) -> tuple[dict[str, Any], Any]:
    """The form that the text of the answer must have: as it was given, and as a schema."""
    text = fields.object("text")
    form = text.object("format") if text is not None else None
    kind, schema = read_format(form)
    if form is None or kind != "json_schema":
        return {"type": kind}, schema
    return {"type": kind, "name": form.text("name"), "strict": form.flag("strict"), "schema": schema}, schema


def _item_id(context: Context) -> str:
    return f"msg_{context.id}"


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message(context: Context, result: GenerationResult | None, *parts: dict[str, Any]) -> dict[str, Any]:
    """The one item of an output; without a result, it has just begun."""
    return {
        "id": _item_id(context),
        "type": "message",
        "role": "assistant",
        "status": _status(result),
        "content": list(parts),
    }


def _status(result: GenerationResult | None) -> str:
    if result is None:
        return "in_progress"
    return "incomplete" if result.finish_reason == "length" else "completed"


def _response(
    question: Question, context: Context, result: GenerationResult | None, output: list[dict[str, Any]]
) -> dict[str, Any]:
    """The response object; without a result, one that has just begun."""
    status = _status(result)
    return {
        "id": f"resp_{context.id}",
        "object": "response",
        "created_at": context.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": question.model or context.service.name,
        "output": output,
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        **question.options,
        "usage": None if result is None else _usage(result),
        **({} if result is None else {"timings": timings(result)}),
    }


def _usage(result: GenerationResult) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": result.reused_tokens,
            "cache_write_tokens": 0,
            "image_tokens": result.visual_tokens,
        },
        "output_tokens": result.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.prompt_tokens + result.generated_tokens,
    }


def _failure(error: FastVLMError) -> dict[str, Any]:
    return {"code": "server_error", "message": str(error)}
