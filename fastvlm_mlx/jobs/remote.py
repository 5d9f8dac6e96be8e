"""One `fastvlm serve` on another machine, as a client sees it: what it holds, and its answers."""

import base64
import json
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError, PromptError, SchemaError, ServerError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.jobs.exchange import Exchange, LostError

_QUESTION_ERRORS: dict[str, type[FastVLMError]] = {
    "image_too_large": ImageError,
    "invalid_image": ImageError,
    "invalid_parameter": ConfigError,
    "invalid_prompt": PromptError,
    "invalid_schema": SchemaError,
    "unsupported_image": ImageError,
}
"""Errors that a question gets from every server, by their codes."""
_NOT_OURS = frozenset(("logprobs", "ignore_eos", "logit_bias", "stop"))
"""Settings of a generation that need a form of their own."""


class BusyError(ServerError):
    """A server without room; `retry_after` says for how many seconds. It holds the same model as before."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OtherError(ServerError):
    """A server that cannot be used: it holds another model, is of another version, or wants another key."""


@dataclass(frozen=True, kw_only=True)
class Holds:
    """What a server says about its model.

    Attributes:
        name: Of the model.
        names: All that clients may call it.
        weights: Its `checkpoint_fingerprint`; empty while it loads.
        dtype: What it computes in.
        version: Of the program.
        fingerprint: In all its answers.
        resolution: Pixels per side that it was trained with.
        max_batch: Questions that it answers at the same time.
        max_tokens: Of its longest answer.
        max_resolution: The largest that may be asked for.
    """

    name: str
    names: tuple[str, ...]
    weights: str
    dtype: str
    version: str
    fingerprint: str
    resolution: int
    max_batch: int
    max_tokens: int
    max_resolution: int

    @property
    def identity(self) -> tuple[str, str, str]:
        """What has to be the same in servers that share work."""
        return self.weights, self.dtype, self.version


def look_at(exchange: Exchange) -> Holds:
    """What a server holds.

    Raises:
        LostError: If it does not answer.
        BusyError: If its model is still loading.
        OtherError: If it is no server of ours, or wants another key.
    """
    status, values = exchange.get("/v1/models")
    if status != 200:
        raise (LostError if status >= 500 else OtherError)(f"answers {status}: {_message(values)}")
    try:
        model = values["data"][0]
        limits = model["limits"]
        holds = Holds(
            name=str(model["id"]),
            names=tuple(str(name).lower() for name in (model["id"], *model["aliases"])),
            weights=str(model["weights"] or ""),
            dtype=str(model["dtype"] or ""),
            version=str(model["version"]),
            fingerprint=str(model["system_fingerprint"] or ""),
            resolution=int(model["image_resolution"] or 0),
            max_batch=int(limits["max_batch"]),
            max_tokens=int(limits["max_tokens"]),
            max_resolution=int(limits["max_resolution"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise OtherError(f"is no server of fastvlm-mlx {__version__}, or an older one") from err
    if not holds.weights or not holds.max_batch:
        raise BusyError("its model is still loading", 1.0)
    return holds


def ask(exchange: Exchange, request: Request, encoded: Encoded, holds: Holds, schema: Any) -> GenerationResult:
    """The answer of a server to a question about one picture.

    Args:
        exchange: The connection.
        request: The question.
        encoded: The picture's file; its bytes are sent as they are.
        holds: What the server has said that it holds.
        schema: That of the request, as the user has given it.

    Raises:
        BusyError: If it has no room.
        LostError: If it gives no answer, or nonsense.
        OtherError: If it holds something else now.
        FastVLMError: Of another kind, if nobody can answer the question.
    """
    status, retry_after, values = exchange.post("/v1/chat/completions", _body(request, encoded, holds, schema))
    if status == 200:
        return _result(request, values, holds)
    message, code, param = _message(values), _field(values, "code"), _field(values, "param")
    if status in (429, 503):
        raise BusyError(message, retry_after)
    if status in (401, 403, 404):
        raise OtherError(f"answers {status}: {message}")
    if status == 413:
        raise ImageError(f"{encoded.name}: is larger than the server takes; start it with a larger --max-body")
    if status == 400 and _field(values, "type") == "invalid_request_error" and code in (None, *_QUESTION_ERRORS):
        if param and param in message:
            message = message.replace(param, encoded.name, 1)
        raise _QUESTION_ERRORS.get(code or "", ConfigError)(message)
    raise LostError(f"answers {status}: {message}")


def _body(request: Request, encoded: Encoded, holds: Holds, schema: Any) -> tuple[bytes, ...]:
    """The body of a question, in parts: the picture is large, and is not copied into one text with the rest."""
    config, defaults = request.config, GenerationConfig()
    values: dict[str, Any] = {
        name: value
        for name, value in vars(config).items()
        if name not in _NOT_OURS and value is not None and value != getattr(defaults, name)
    }
    values |= {
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "resolution": holds.resolution if request.resolution is None else request.resolution,
        "stop": list(config.stop),
        "logit_bias": {str(token): bias for token, bias in dict(config.logit_bias).items()},
        "ignore_eos": config.ignore_eos,
        "background": request.background,
        "prefix": request.prefix,
        "sentence": request.sentence,
        "max_words": request.max_words,
        "removes_openings": request.opening is not None,
    }
    if request.schema is not None:
        form = {"type": "json_schema", "json_schema": {"name": "caption", "schema": schema}}
        values["response_format"] = form if isinstance(schema, dict) else {"type": "json_object"}
    system = [] if request.system is None else [{"role": "system", "content": request.system}]
    place = "\0"
    content = [{"type": "image_url", "image_url": {"url": place}}, {"type": "text", "text": request.prompt}]
    values["messages"] = [*system, {"role": "user", "content": content}]
    given = {name: value for name, value in values.items() if value not in (None, False, "", [], {})}
    head, _, tail = json.dumps(given | {"temperature": config.temperature}).partition(json.dumps(place))
    return head.encode() + b'"data:;base64,', base64.b64encode(encoded.data), b'"' + tail.encode()


def _result(request: Request, values: Any, holds: Holds) -> GenerationResult:
    """The answer in what a server has sent.

    Raises:
        LostError: If there is none, or it cannot be one.
        OtherError: If another model has given it.
    """
    try:
        fingerprint = values["system_fingerprint"]
        choice, usage, timings = values["choices"][0], values["usage"], values["timings"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        prompt, generated = usage["prompt_tokens"], usage["completion_tokens"]
        visual = usage["prompt_tokens_details"]["image_tokens"]
        seconds = {
            name: float(timings[key]) / 1000
            for name, key in (
                ("preprocess", "preprocess_ms"),
                ("ttft", "time_to_first_token_ms"),
                ("decode", "generation_time_ms"),
                ("total", "total_ms"),
                ("queue", "queue_time_ms"),
            )
        }
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise LostError("an answer that is none") from err
    if fingerprint != holds.fingerprint:
        raise OtherError(f"answers as {printable(fingerprint, 60)}, not {printable(holds.fingerprint, 60)} any more")
    counts = all(type(count) is int and count > 0 for count in (prompt, generated, visual))
    if not isinstance(text, str) or reason not in ("stop", "length") or not counts:
        raise LostError("an answer that is none")
    if generated > request.config.max_tokens or visual >= prompt or not text.startswith(request.prefix):
        raise LostError("an answer that cannot be one")
    if request.schema is not None and reason == "stop" and not _is_json(text):
        raise LostError("an answer that is not of the schema")
    return GenerationResult(
        text=text,
        token_ids=(),
        prompt_tokens=prompt,
        visual_tokens=visual,
        generated_tokens=generated,
        finish_reason=reason,
        timings=Timings(**seconds),
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _field(values: Any, name: str) -> str | None:
    """A field of an error in OpenAI's shape."""
    error = values.get("error") if isinstance(values, dict) else None
    value = error.get(name) if isinstance(error, dict) else None
    return value if isinstance(value, str) else None


def _message(values: Any) -> str:
    return printable(_field(values, "message") or "without a reason")
