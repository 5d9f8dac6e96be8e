"""Turns the messages of a request into a prompt for the model, within what the server allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.inputs.prompts import DEFAULT_PROMPT, Message
from fastvlm_mlx.inputs.resolution import Resolution, as_resolution
from fastvlm_mlx.inputs.sources import Allow
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.api import ApiError, Context
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.media import Images
from fastvlm_mlx.server.settings import LOW_RESOLUTION

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DETAILS = ("auto", "low", "high", "original")
_MEANING = {
    "tool_calls": "this server calls no tools",
    "tool_call_id": "this server calls no tools",
    "function_call": "this server calls no functions",
    "audio": "this server hears no sound",
}
_HARMLESS = ("refusal", "annotations", "reasoning", "reasoning_content", "logprobs", "cache_control")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The messages of a request, ready for the model.

    Attributes:
        messages: For `Request.prompt`.
        allow: For `Request.allow`: images name nothing any more.
        details: The `detail` of each image.
        warnings: Keys that were ignored.
    """

    messages: tuple[Message, ...]
    allow: Allow = Allow.DATA_ONLY
    details: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def resolution(self, requested: Resolution, context: Context) -> Resolution:
        """Pixels per side of the images.

        What the request says counts; otherwise `low` is 512 if every image has it and the server's own resolution is
        larger, and all else is the server's.
        """
        if requested is not None:
            return requested
        default = context.settings.resolution
        native = context.service.native_resolution if default is None else default
        if self.details and set(self.details) == {"low"} and isinstance(native, int) and native > LOW_RESOLUTION:
            return LOW_RESOLUTION
        return default


def read_messages(values: Sequence[Any] | None, context: Context, where: str = "messages") -> Conversation:
    """The conversation in OpenAI's messages.

    Args:
        values: The messages.
        context: The request.
        where: What they are called in errors.

    Raises:
        ApiError: If a message has an unknown form, or an image cannot be shown.
    """
    if not values:
        raise ApiError(400, f"{where} must be a list of messages, with one at least", param=where)
    reader = _Reader(context)
    messages = [reader.message(value, f"{where}[{number}]") for number, value in enumerate(values)]
    return Conversation(
        messages=_with_one_system(messages),
        details=tuple(reader.details),
        warnings=tuple(dict.fromkeys(reader.warnings)),
    )


def _with_one_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, with the system messages that begin them as one."""
    count = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    parts = [part for message in messages[:count] for part in message["content"]]
    return (*([{"role": "system", "content": parts}] if parts else []), *messages[count:])


def read_resolution(fields: Fields, context: Context) -> Resolution:
    """The resolution of images that a request asks for, an extension of ours.

    Raises:
        ApiError: If no model can run at it, or the server does not allow it.
    """
    value: Any = fields.value("resolution")
    if value is None:
        return None
    try:
        resolution = as_resolution(value)
    except ConfigError as err:
        raise ApiError(400, str(err), param="resolution", code="invalid_parameter") from err
    if isinstance(resolution, int) and resolution > (most := context.settings.max_resolution):
        raise ApiError(
            400,
            f"resolution must be at most {most} here, not {resolution}; --max-resolution of the server changes that",
            param="resolution",
            code="invalid_parameter",
        )
    return resolution


class _Reader:
    """Reads messages one by one; notes the images among them and what it ignores."""

    def __init__(self, context: Context) -> None:
        self.details: list[str] = []
        self.warnings: list[str] = []
        self._images = Images(context.settings)

    def message(self, value: object, where: str) -> Message:
        if not isinstance(value, Mapping):
            raise ApiError(400, f"{where} must be an object, not {shown(value)}", param=where)
        fields = Fields(value, f"{where}.")
        fields.refuse(_MEANING)
        fields.ignore("name", *_HARMLESS)
        role = fields.text("role")
        if role not in ROLES:
            raise fields.wrong("role", f"one of {', '.join(ROLES)}")
        content = fields.value("content")
        if isinstance(content, str):
            parts: list[dict[str, Any]] = [{"type": "text", "text": content}]
        elif isinstance(content, list):
            each = [self._parts(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
            parts = [part for several in each for part in several]
        else:
            raise fields.wrong("content", "a text or a list of parts")
        self.warnings += fields.unknown()
        images = [part for part in parts if part["type"] == "image"]
        if images and role != "user":
            raise ApiError(400, f"{where}: images can only be shown in user messages", param=f"{where}.content")
        if images and not any(part["text"].strip() for part in parts if part["type"] == "text"):
            parts = [*images, {"type": "text", "text": DEFAULT_PROMPT}]
        return {"role": ROLES[role], "content": parts}

    def _parts(self, value: object, where: str) -> list[dict[str, Any]]:
        """A text or an image; a document is an image for each page."""
        if not isinstance(value, Mapping):
            raise ApiError(400, f"{where} must be an object, not {shown(value)}", param=where)
        fields = Fields(value, f"{where}.")
        fields.ignore(*_HARMLESS)
        kind = fields.text("type")
        if kind in ("text", "input_text", "output_text"):
            text = fields.text("text")
            if text is None:
                raise fields.wrong("text", "a text")
            parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        elif kind in ("image_url", "input_image"):
            parts = [{"type": "image", "image": image} for image in self._images_of(fields, where)]
        else:
            raise ApiError(
                400,
                f"{where}.type must be text or image_url, not {shown(value.get('type'))}",
                param=f"{where}.type",
                code="unsupported_content",
            )
        self.warnings += fields.unknown()
        return parts

    def _images_of(self, fields: Fields, where: str) -> list[Any]:
        value = fields.value("image_url")
        detail = fields.text("detail", "auto", among=DETAILS)
        if isinstance(value, Mapping):
            inner = fields.object("image_url")
            assert inner is not None
            value, detail = inner.text("url"), inner.text("detail", detail, among=DETAILS)
            where = f"{where}.image_url.url"
        else:
            where = f"{where}.image_url"
        if not isinstance(value, str):
            raise ApiError(
                400, f"{where} must be a data: URL, not {shown(value)}", param=where, code="invalid_parameter"
            )
        images = self._images.read(value, where)
        self.details += [detail or "auto"] * len(images)
        return list(images)
