"""Conversations as files: the body of a request to OpenAI's chat completions, as JSON."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastvlm_mlx.chat.conversation import Conversation, Turn
from fastvlm_mlx.chat.pictures import Picture, is_url
from fastvlm_mlx.chat.settings import Settings
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.outputs import write_output
from fastvlm_mlx.schema import array, mapping, parse_object, read_small_file, shown

LARGEST = 256_000_000
"""The most bytes of a file; pictures may be in it."""
_FIELDS = ("model", "messages")


def save(path: Path, conversation: Conversation, settings: Settings, model: str) -> None:
    """Writes a conversation, whole or not at all.

    Pictures are named by `file:` URLs. What has no path, or has changed since it was read, is in the file itself.

    Raises:
        ConfigError: If the file cannot be written.
    """
    record = {"model": model, "messages": _messages(conversation), **settings.changed}
    text = json.dumps(record, ensure_ascii=False, indent=1)
    write_output(path, text.encode("utf-8", "backslashreplace") + b"\n")


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _url(picture)}} for picture in turn.pictures
        ]
        content = [*parts, {"type": "text", "text": turn.text}] if parts else turn.text
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _url(picture: Picture) -> str:
    if is_url(picture.source):
        return picture.source
    try:
        with open(picture.source, "rb") as file:
            is_same = file.read(len(picture.encoded.data) + 1) == picture.encoded.data
    except OSError:
        is_same = False
    if is_same:
        return f"file://{quote(os.fsencode(picture.source))}"
    return f"data:{picture.encoded.media_type or 'image/*'};base64,{base64.b64encode(picture.encoded.data).decode()}"


def load(path: Path, defaults: Settings) -> tuple[Conversation, Settings, str]:
    """A conversation, its settings and the name of the model that gave its answers. Reads its pictures.

    Raises:
        FastVLMError: If the file cannot be read, is no conversation, or a picture of it cannot be read.
    """
    label = printable(path)
    data = read_small_file(path, LARGEST)
    if data is None:
        raise PromptError(f"{label}: no such file")
    record = parse_object(data, label, most=LARGEST, error=PromptError, advice="; save the conversation again")
    messages = [mapping(each, f"{label}: a message") for each in array(record.get("messages"), f"{label}: messages")]
    conversation = Conversation()
    if messages and messages[0].get("role") == "system":
        conversation.system = _text(messages.pop(0).get("content"), f"{label}: message 1 (system)")
    if len(messages) % 2:
        raise PromptError(f"{label}: the last question has no answer; expected questions and answers in turn")
    first = 1 if conversation.system is None else 2
    for number in range(0, len(messages), 2):
        question, answer = messages[number : number + 2]
        roles = question.get("role"), answer.get("role")
        if roles != ("user", "assistant"):
            wrong = 0 if roles[0] != "user" else 1
            raise PromptError(
                f"{label}: message {first + number + wrong} is of the role {shown(roles[wrong])}, expected "
                f"{('user', 'assistant')[wrong]}; questions and answers take turns"
            )
        where = f"{label}: message {first + number} (user)"
        text, pictures = _question(question.get("content"), where)
        reply = _text(answer.get("content"), f"{label}: message {first + number + 1} (assistant)")
        conversation.turns.append(Turn(text=text, pictures=pictures, answer=reply))
    try:
        settings = defaults.with_values({key: value for key, value in record.items() if key not in _FIELDS})
    except FastVLMError as err:
        raise PromptError(f"{label}: {err}") from err
    model = record.get("model")
    return conversation, settings, model if isinstance(model, str) else ""


def _text(value: Any, where: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "\n".join(_text(part.get("text"), where) for part in value)
    if not isinstance(value, str):
        raise PromptError(f"{where}: the content must be text, not {shown(value)}")
    return value


def _question(content: Any, where: str) -> tuple[str, tuple[Picture, ...]]:
    """The text and the pictures of a question."""
    if isinstance(content, str):
        return content, ()
    texts: list[str] = []
    pictures: list[Picture] = []
    for part in array(content, f"{where}: the content"):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                pictures.append(_picture(url, where))
            case _:
                raise PromptError(f"{where} has an unknown part {shown(part)}; known are text and image_url")
    return "\n".join(texts), tuple(pictures)


def _picture(url: str, where: str) -> Picture:
    try:
        return Picture.of(url)
    except FastVLMError as err:
        raise PromptError(f"{where}: {err}") from err


class Keeper:
    """Keeps the last conversation in a file that only its owner can read.

    Args:
        folder: Of the file; made when there is something to keep.
        notify: Is told once if the file cannot be written.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self.path = folder / "last.json"
        self._notify = notify
        self._failed = False

    def keep(self, conversation: Conversation, settings: Settings, model: str) -> None:
        """Writes the conversation, if it has a turn."""
        if not conversation.turns or self._failed:
            return
        try:
            make_private(self.path.parent)
            mask = os.umask(0o177)
            try:
                save(self.path, conversation, settings, model)
            finally:
                os.umask(mask)
        except (FastVLMError, OSError) as err:
            self._failed = True
            self._notify(f"the conversation is not kept for --continue: {getattr(err, 'strerror', None) or err}")


def make_private(folder: Path) -> None:
    """Makes a folder that only its owner can open, and those above it.

    Raises:
        OSError: If the system refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
