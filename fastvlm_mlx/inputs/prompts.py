"""Turns conversations in the OpenAI shape into ChatML, keeping the user's text apart from the markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

from fastvlm_mlx.arguments import check_kind, valid_text
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.formatting import counted
from fastvlm_mlx.inputs.sources import Allow, Encoded, ImageSource
from fastvlm_mlx.schema import shown

Message: TypeAlias = Mapping[str, Any]
"""`{"role": …, "content": …}`; the content is a string or a list of parts.

A part is `{"type": "text", "text": …}`, `{"type": "image_url", "image_url": {"url": …}}` or
`{"type": "image", "image": ImageSource}`; `url`, `path` or `base64` may stand for `image`, as in transformers.
`{"type": "image"}` alone is the place of an image that is given separately. A key whose value is None counts as absent.
Keys that would change nothing are refused, but for the `name` of a message and the `detail` of an `image_url`.
"""
Prompt: TypeAlias = str | Sequence[Message]

DEFAULT_PROMPT = "Describe the image."
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] in ['image', 'image_url'] %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ ('' if loop.first else '\\n') + part['text'] }}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same as `render`, as a Jinja template for other programs."""


class Mark(Enum):
    """Markup between pieces of text."""

    IM_START = "<|im_start|>"
    IM_END = "<|im_end|>"
    IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image that has yet to be read.

    Attributes:
        source: Where it comes from.
        allow: What `source` may refer to.
    """

    source: ImageSource | Encoded
    allow: Allow


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        text: Its text.
        images: The images before the text; None is the place of an image that is given separately.
    """

    role: str
    text: str
    images: tuple[ImageReference | None, ...] = ()


def conversation(
    prompt: Prompt,
    images: Sequence[ImageSource] = (),
    system: str | None = None,
    *,
    allow: Allow | None = None,
) -> tuple[Turn, ...]:
    """The turns of a question: a system turn first, a user turn last.

    Args:
        prompt: The question, or the messages so far.
        images: The images of a string `prompt`. With messages, they fill the `{"type": "image"}` parts in order, or
            belong to the first user message if the messages have no image parts at all.
        system: Replaces the default system text.
        allow: What images may refer to. By default, `images` may refer to anything, and so may objects in messages,
            such as a `pathlib.Path`; a *string* in messages, which may come from anywhere, must be a `data:` URL or a
            URL of a host on the public internet (`Allow.PUBLIC`).

    Raises:
        PromptError: If there is nothing to answer, or a message has an unknown form.
        ConfigError: If `allow` is no `Allow`.
    """
    if allow is not None:
        check_kind(allow, "allow", Allow, "an Allow or None")
    references = [ImageReference(source=image, allow=allow or Allow.ALL) for image in images]
    if isinstance(prompt, str):
        turns = [Turn(role="user", text=valid_text(prompt, "the prompt"), images=tuple(references))]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray, memoryview)) and prompt:
        turns = [_turn(message, f"message {number}", allow) for number, message in enumerate(prompt, 1)]
        turns = _place(turns, references)
    else:
        found = "an empty one" if isinstance(prompt, (list, tuple)) else type(prompt).__name__
        raise PromptError(f"a prompt must be a string or a list of messages, not {found}")
    if turns[0].role != "system":
        text = DEFAULT_SYSTEM if system is None else valid_text(system, "the system text")
        turns.insert(0, Turn(role="system", text=text))
    elif system is not None:
        raise PromptError("there is a system text and a system message; give one of them")
    _check_order(turns)
    return tuple(turns)


def render(turns: Sequence[Turn]) -> Iterator[str | Mark]:
    """The ChatML of a conversation up to where the answer starts, in pieces of text that are tokenized one by one."""
    for turn in turns:
        yield Mark.IM_START
        yield f"{turn.role}\n" if turn.images else f"{turn.role}\n{turn.text}"
        for left in reversed(range(len(turn.images))):
            yield Mark.IMAGE
            yield "\n" if left else f"\n{turn.text}"
        yield Mark.IM_END
        yield "\n"
    yield Mark.IM_START
    yield "assistant\n"


def _turn(message: object, where: str, allow: Allow | None) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        hint = "; one question alone is a string" if isinstance(message, str) else ""
        raise PromptError(f'{where} must have the form {{"role": …, "content": …}}, not {shown(message)}{hint}')
    if unknown := [key for key in _present(message) if key not in ("role", "content", "name")]:
        raise PromptError(f"{where} has the unknown key {shown(unknown[0])}; images are parts of the content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where} has the unknown role {shown(role)}; known are {', '.join(ROLES)}")
    where = f"{where} ({role})"
    if isinstance(content, str):
        return Turn(role=role, text=valid_text(content, where))
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray, memoryview)):
        raise PromptError(f"{where}: the content must be a string or a list of parts, not {type(content).__name__}")
    texts: list[str] = []
    sources: list[Any] = []
    for part in content:
        match _present(part):
            case {"type": "text", "text": text, **others} if not others:
                texts.append(valid_text(text, where))
            case {"type": "image_url", "image_url": {"url": str(url), **details}, **others} if (
                not others and details.keys() <= {"detail"}
            ):
                sources.append(url)
            case {"type": "image_url", "image_url": str(url), **others} if not others:
                sources.append(url)
            case {"type": "image", "base64": str(data), **others} if not others:
                sources.append(f"data:;base64,{data}")
            case (
                {"type": "image", "image": source, **others}
                | {"type": "image", "url": source, **others}
                | {"type": "image", "path": source, **others}
            ) if not others:
                sources.append(source)
            case {"type": "image", **others} if not others:
                sources.append(None)
            case _:
                raise PromptError(
                    f"{where} has an unknown part {shown(part)}; known are "
                    '{"type": "text", "text": …}, {"type": "image_url", "image_url": {"url": …}}, '
                    '{"type": "image", "image": …} (or url, path, base64); other keys are not'
                )
    if sources and role != "user":
        raise PromptError(f"{where}: images can only be shown in user messages")
    images = tuple(None if source is None else _reference(source, allow) for source in sources)
    return Turn(role=role, text="\n".join(texts), images=images)


def _present(value: object) -> dict[str, Any]:
    """The entries of a mapping that are neither None nor an empty list; none of what is no mapping."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {key: each for key, each in items if each is not None and not (isinstance(each, list) and not each)}


def _reference(source: ImageSource, allow: Allow | None) -> ImageReference:
    """The image of a message; by default, a string is trusted less than an object, which only a program can make."""
    default = Allow.PUBLIC if isinstance(source, str) else Allow.ALL
    return ImageReference(source=source, allow=default if allow is None else allow)


def _place(turns: list[Turn], images: Sequence[ImageReference]) -> list[Turn]:
    """Puts `images` into the open places, or before the first user text if no turn has images."""
    if images and not any(turn.images for turn in turns):
        first = next((turn for turn in turns if turn.role == "user"), None)
        return [replace(turn, images=tuple(images)) if turn is first else turn for turn in turns]
    places = sum(image is None for turn in turns for image in turn.images)
    if places != len(images):
        raise PromptError(
            f'{counted(len(images), "image")} for {places} {{"type": "image"}} in the messages; the numbers must agree'
        )
    supply = iter(images)
    return [
        replace(turn, images=tuple(next(supply) if image is None else image for image in turn.images)) for turn in turns
    ]


def _check_order(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        if number and turn.role == "system":
            raise PromptError("a system message can only be the first one")
        if turn.role == "user" and not turn.text.strip():
            raise PromptError("the prompt is empty; say what to do, such as 'Describe the image.'")
    if turns[-1].role != "user":
        raise PromptError(f"the last message must be the user's, not the {turns[-1].role}'s")
