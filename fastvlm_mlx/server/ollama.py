"""Ollama's `POST /api/generate` and `POST /api/chat`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.api import ApiError, Context, Question
from fastvlm_mlx.server.events import line
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.logprobs import read_logprobs, shown_logprobs
from fastvlm_mlx.server.messages import read_messages, read_resolution
from fastvlm_mlx.server.sampling import read_config
from fastvlm_mlx.server.schemas import ANY_OBJECT, with_schema

MEANING = {
    "raw": "every prompt gets the model's template",
    "template": "every prompt gets the model's own template",
    "context": "no tokens of earlier answers are taken; send the messages to /api/chat",
    "suffix": "nothing is inserted between texts",
    "tools": "this server calls no tools",
    "think": "the model answers without thinking aloud",
}
_MACHINE = (
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "num_keep",
    "numa",
    "low_vram",
    "f16_kv",
    "use_mmap",
    "use_mlock",
)
"""Options about where a model runs; they change nothing here."""

_PLACE = re.compile(r"\[img(?:-\d+)?\]\n?")


class Ollama:
    """What all of Ollama's addresses share."""

    media_type = "application/x-ndjson"

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that an error has."""
        return {"error": str(error)}

    def broken(self, error: ApiError) -> bytes:
        """The last part of a stream that an error ends."""
        return line(self.error(error))


class _Answers(Ollama, ABC):
    """What `Generate` and `Chat` share."""

    @abstractmethod
    def _messages(self, fields: Fields) -> list[Any]:
        """The messages of a request in OpenAI's shape; none to load the model only."""

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]:
        """The text of an answer, under the API's key."""

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body."""
        fields = Fields(body)
        model = fields.text("model")
        if not model:
            raise fields.wrong("model", "the model's name")
        context.service.check(model)
        fields.refuse(MEANING)
        fields.ignore("keep_alive", "truncate", "shift")
        stream = fields.flag("stream", True)
        config = _read_options(fields, context)
        schema = _read_format(fields)
        resolution = read_resolution(fields, context)
        messages = self._messages(fields)
        if not messages:
            return Question(requests=(), model=model, warnings=fields.unknown())
        conversation = read_messages(messages, context)
        request = Request(
            prompt=conversation.messages,
            allow=conversation.allow,
            resolution=conversation.resolution(resolution, context),
            config=config,
        )
        request = with_schema(request, schema, "format")
        warnings = (*fields.unknown(), *conversation.warnings)
        return Question(requests=(request,), stream=stream, model=model, warnings=warnings)

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of a whole answer."""
        if not results:
            return {**_head(question), **self._text(""), "done": True, "done_reason": "load"}
        (result,) = results
        return self._last(question, result, result.text, shown_logprobs(result, context))

    async def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer: a line each, the last one with the statistics."""
        async for _, piece in pieces:
            shown_tokens = shown_logprobs(piece, context)
            if piece.text or shown_tokens:
                logprobs = {"logprobs": shown_tokens} if shown_tokens else {}
                yield line({**_head(question), **self._text(piece.text), **logprobs, "done": False})
            if piece.finish_reason is not None:
                yield line(self._last(question, piece, "", []))

    def _last(
        self, question: Question, result: GenerationResult, text: str, logprobs: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            **_head(question),
            **self._text(text),
            **({"logprobs": logprobs} if logprobs else {}),
            "done": True,
            "done_reason": result.finish_reason,
            **_statistics(result),
        }


class Generate(_Answers):
    """Ollama's answers to one prompt."""

    path = "/api/generate"

    def _messages(self, fields: Fields) -> list[Any]:
        prompt, system, images = fields.text("prompt", ""), fields.text("system"), fields.array("images") or []
        if not prompt and not images:
            return []
        user = {"role": "user", "content": _content(prompt, images, "images")}
        return [{"role": "system", "content": system}, user] if system else [user]

    def _text(self, text: str) -> dict[str, Any]:
        return {"response": text}


class Chat(_Answers):
    """Ollama's answers to a conversation."""

    path = "/api/chat"

    def _messages(self, fields: Fields) -> list[Any]:
        values = fields.array("messages") or []
        return [_message(value, f"messages[{number}]") for number, value in enumerate(values)]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


def _message(value: Any, where: str) -> Any:
    """A message in OpenAI's shape."""
    if not isinstance(value, dict):
        return value
    fields = Fields(value, f"{where}.")
    content, images = fields.text("content", ""), fields.array("images") or []
    rest = {key: value[key] for key in value if key not in ("images", "thinking")}
    return {**rest, "content": _content(content, images, f"{where}.images")}


def _content(text: str | None, images: list[Any], where: str) -> list[dict[str, Any]]:
    """Text and images in base64 as parts of a message.

    A text may mark the places of its images; here, every image comes before the text.
    """
    text = _PLACE.sub("", text or "", count=len(images)) if images else text
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not images else []
    for number, image in enumerate(images):
        if not isinstance(image, str) or not image:
            place = f"{where}[{number}]"
            message = f"{place} must be an image in base64, not {shown(image)}"
            raise ApiError(400, message, param=place, code="invalid_parameter")
        url = image if image[:5].lower() == "data:" else f"data:;base64,{image}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _read_options(fields: Fields, context: Context) -> GenerationConfig:
    """The settings of a request; without `num_predict`, or with one below 1, the answer ends where the server says."""
    options = fields.object("options") or Fields({}, "options.")
    options.ignore(*_MACHINE)
    length = options.whole("num_predict", 0, least=-2) or 0
    names = {"repetition_penalty": "repeat_penalty"}
    config = read_config(options, context, limits=(), names=names, logprobs=read_logprobs(fields))
    return replace(config, max_tokens=min(length, config.max_tokens)) if length > 0 else config


def _read_format(fields: Fields) -> Any:
    """The form that the answer must have, as a schema."""
    form = fields.value("format")
    if form in (None, ""):
        return None
    if form == ANY_OBJECT or isinstance(form, dict):
        return form
    raise fields.wrong("format", "json or a JSON schema")


def _head(question: Question) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {"model": question.model, "created_at": now}


def _statistics(result: GenerationResult) -> dict[str, int]:
    """Counts, and times in nanoseconds; the model is loaded before the first question."""
    seconds = result.timings
    return {
        "total_duration": _nanoseconds(seconds.total),
        "load_duration": 0,
        "prompt_eval_count": result.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(seconds.ttft - seconds.queue),
        "eval_count": result.generated_tokens,
        "eval_duration": _nanoseconds(seconds.decode),
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
