"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.jobs.captions import opening_length
from fastvlm_mlx.server.api import ApiError, Context, Question, openai_error
from fastvlm_mlx.server.events import event
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.logprobs import read_logprobs, shown_logprobs
from fastvlm_mlx.server.messages import read_messages, read_resolution
from fastvlm_mlx.server.sampling import read_config, without_effect
from fastvlm_mlx.server.schemas import read_format, with_schema

MEANING = {
    "tools": "this server calls no tools",
    "functions": "this server calls no functions",
    "function_call": "this server calls no functions",
    "audio": "this server makes no sound",
    "web_search_options": "this server searches nothing",
    "prompt": "/v1/chat/completions reads messages",
    "echo": "answers never repeat the prompt",
    "best_of": "every answer is returned; ask for n of them",
    "guided_choice": "give a schema in response_format",
    "guided_grammar": "give a schema in response_format",
    "guided_json": "give the schema in response_format",
    "guided_regex": "give a schema in response_format",
    "structured_outputs": "give the schema in response_format",
    "grammar": "give a schema in response_format",
    "json_schema": "give the schema in response_format",
    "prompt_logprobs": "only the tokens of the answer have probabilities here",
}
"""What would change the answer and is not done here, and why; everything else that is unknown gets a warning."""
_HARMLESS = tuple("user metadata store service_tier parallel_tool_calls safety_identifier prompt_cache_key".split())
_OBJECT = "chat.completion"


class ChatCompletions:
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"
    media_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question in a body."""
        fields = Fields(body)
        model = fields.text("model", "") or ""
        context.service.check(model)
        _refuse(fields)
        conversation = read_messages(fields.array("messages"), context)
        count = fields.whole("n", 1, least=1, most=context.service.most_requests) or 1
        stream = fields.flag("stream")
        stream_options = fields.object("stream_options")
        usage = stream_options.flag("include_usage") if stream_options else False
        if stream_options:
            stream_options.ignore("include_obfuscation", "continuous_usage_stats")
        config = read_config(fields, context, logprobs=read_logprobs(fields))
        _, schema = read_format(fields.object("response_format"), nested="json_schema")
        request = Request(
            prompt=conversation.messages,
            allow=conversation.allow,
            resolution=conversation.resolution(read_resolution(fields, context), context),
            background=fields.text("background"),
            config=config,
            sentence=fields.flag("sentence"),
            prefix=fields.text("prefix", "") or "",
            max_words=fields.whole("max_words", least=1),
            opening=opening_length if fields.flag("removes_openings") else None,
        )
        return Question(
            requests=several(with_schema(request, schema, "response_format"), count),
            stream=stream,
            model=model,
            warnings=(*fields.unknown(), *conversation.warnings, *without_effect(config, count)),
            options={"include_usage": usage},
        )

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of a whole answer."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": _logprobs(result, context),
                "finish_reason": result.finish_reason,
            }
            for number, result in enumerate(results)
        ]
        return {
            **_head(question, context, _OBJECT),
            "choices": choices,
            "usage": usage(results),
            "timings": timings(results[0]),
        }

    async def stream(
        self, question: Question, pieces: AsyncIterator[tuple[int, GenerationResult]], context: Context
    ) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer, each a chunk of OpenAI's; the last one is `[DONE]`."""
        head = _head(question, context, f"{_OBJECT}.chunk")
        latest: dict[int, GenerationResult] = {}
        include_usage = question.options["include_usage"]
        more = {"usage": None} if include_usage else {}
        async for number, piece in pieces:
            delta: dict[str, Any] = {} if number in latest else {"role": "assistant", "content": ""}
            latest[number] = piece
            if piece.text:
                delta["content"] = piece.text
            if not delta and piece.finish_reason is None and not piece.logprobs:
                continue
            choice = {
                "index": number,
                "delta": delta,
                "logprobs": _logprobs(piece, context),
                "finish_reason": piece.finish_reason,
            }
            end = {"timings": timings(piece)} if piece.finish_reason else {}
            yield event({**head, "choices": [choice], **more, **end})
        if include_usage:
            results = [latest[number] for number in sorted(latest)]
            yield event({**head, "choices": [], "usage": usage(results), "timings": timings(results[0])})
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that an error has."""
        return openai_error(error)

    def broken(self, error: ApiError) -> bytes:
        """The last part of a stream that an error ends."""
        return event(openai_error(error))


def several(request: Request, count: int) -> tuple[Request, ...]:
    """A request `count` times, with seeds that follow one another if it has one."""
    seed = request.config.seed
    configs = [replace(request.config, seed=None if seed is None else (seed + n) % 2**64) for n in range(count)]
    return tuple(replace(request, config=config) for config in configs)


def usage(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """The tokens of answers to one prompt, in OpenAI's words."""
    prompt, answers = results[0].prompt_tokens, sum(result.generated_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "prompt_tokens_details": {
            "cached_tokens": min(result.reused_tokens for result in results),
            "image_tokens": results[0].visual_tokens,
        },
    }


def timings(result: GenerationResult) -> dict[str, float]:
    """Milliseconds that the parts of an answer took, in vLLM's words."""
    seconds = result.timings
    steps = max(result.generated_tokens - 1, 1)
    return {
        "preprocess_ms": _milliseconds(seconds.preprocess),
        "queue_time_ms": _milliseconds(seconds.queue),
        "time_to_first_token_ms": _milliseconds(seconds.ttft),
        "generation_time_ms": _milliseconds(seconds.decode),
        "mean_itl_ms": _milliseconds(seconds.decode / steps),
        "total_ms": _milliseconds(seconds.total),
        "tokens_per_second": round(result.tokens_per_second, 2),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


def _head(question: Question, context: Context, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{context.id}",
        "object": kind,
        "created": context.created,
        "model": question.model or context.service.name,
        "system_fingerprint": context.service.fingerprint,
    }


def _refuse(fields: Fields) -> None:
    """Refuses what would change the meaning of a request."""
    fields.refuse(MEANING)
    fields.ignore(*_HARMLESS)
    if fields.value("tool_choice") not in (None, "none", "auto"):
        fields.refuse({"tool_choice": "this server calls no tools"})
    modalities = fields.value("modalities")
    if modalities not in (None, ["text"]):
        fields.refuse({"modalities": "this server answers with text"})


def _logprobs(result: GenerationResult, context: Context) -> dict[str, Any] | None:
    return {"content": shown_logprobs(result, context), "refusal": None} if result.logprobs else None
