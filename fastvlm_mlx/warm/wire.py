"""What client and background server say to each other: a question with its images, and lines of JSON back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastvlm_mlx import errors
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.result import Choice, GenerationResult, Timings
from fastvlm_mlx.inputs.prompts import Prompt
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Encoded

HELLO, ASK, STATUS, STOP = "/warm/hello", "/warm/ask", "/warm/status", "/warm/stop"
"""The paths of the requests: whether a model is held, a question, what there is to know, and the end."""
PROTOCOL = 2


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with all that its answer depends on, but for the model.

    Attributes:
        images: Encoded images, in the order of their places in the prompt.
        prompt: A text, or messages in which `{"type": "image"}` is the place of an image.
        system: Replaces the default system text.
        resolution: Side in pixels.
        background: Colour under transparent pixels.
        config: How tokens are chosen.
        sentence: Whether the answer ends after its first sentence.
        choices: Answers to give the probabilities of, instead of a new one.
        schema: A JSON schema that the answer has to match.
        prefix: What the answer begins with.
        max_words: The most words of the answer.
        removes_openings: Whether a phrase such as "The image shows" will be removed, so that its words do not count.
    """

    images: Sequence[Encoded] = ()
    prompt: Prompt
    system: str | None = None
    resolution: Resolution = None
    background: str | None = None
    config: GenerationConfig = field(default_factory=GenerationConfig)
    sentence: bool = False
    choices: Sequence[str] = ()
    schema: Any = None
    prefix: str = ""
    max_words: int | None = None
    removes_openings: bool = False

    def encode(self, **extra: Any) -> bytes:
        """The question as a line of JSON, and the bytes of the images behind it."""
        settings = {name: getattr(self, name) for name in _PLAIN}
        images = [{"name": image.name, "type": image.media_type, "bytes": len(image.data)} for image in self.images]
        head = {**settings, **extra, "config": asdict(self.config), "images": images}
        return b"".join([line(head), *(image.data for image in self.images)])

    @classmethod
    def decode(cls, body: bytes | bytearray) -> tuple[Question, dict[str, Any]]:
        """A question, and what `encode` was given besides.

        Raises:
            ValueError: If it is none, and with TypeError or KeyError, too.
            FastVLMError: If a setting is out of range.
        """
        end = body.index(b"\n") + 1
        head: dict[str, Any] = json.loads(body[:end])
        images = []
        for image in head.pop("images"):
            data = bytes(body[end : end + image["bytes"]])
            if len(data) != image["bytes"]:
                raise ValueError("an image is cut off")
            end += len(data)
            images.append(Encoded(data, image["name"], image["type"]))
        config = GenerationConfig(**head.pop("config"))
        settings = {name: head.pop(name) for name in _PLAIN}
        return cls(images=images, config=config, **settings), head


_PLAIN = (
    "prompt",
    "system",
    "resolution",
    "background",
    "sentence",
    "choices",
    "schema",
    "prefix",
    "max_words",
    "removes_openings",
)
"""The fields of a question that JSON has as they are."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The room that a question takes.

    Attributes:
        prompt_tokens: Positions of the prompt; an image counts as its visual tokens.
        visual_tokens: How many of those are images.
        context_length: The most positions of prompt and answer.
    """

    prompt_tokens: int
    visual_tokens: int
    context_length: int


def line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON, in ASCII: names that are not UTF-8 survive."""
    return json.dumps(record).encode("ascii") + b"\n"


def piece_record(piece: GenerationResult) -> dict[str, Any]:
    """A piece of an answer as JSON; probabilities of tokens are left out, which the command line never shows."""
    values = {name: value for name, value in vars(piece).items() if name != "logprobs"}
    return {"piece": {**values, "timings": vars(piece.timings)}}


def read_piece(values: dict[str, Any]) -> GenerationResult:
    """The piece that `piece_record` wrote."""
    timings, tokens = Timings(**values.pop("timings")), tuple(values.pop("token_ids"))
    return GenerationResult(**values, timings=timings, token_ids=tokens)


def choices_record(choices: Sequence[Choice]) -> dict[str, Any]:
    """Choices as JSON."""
    return {"choices": [vars(choice) for choice in choices]}


def error_record(error: FastVLMError) -> dict[str, Any]:
    """An error as JSON."""
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def read_error(values: Mapping[str, Any]) -> FastVLMError:
    """The error that `error_record` wrote, as one of its class."""
    kind = getattr(errors, str(values["type"]), FastVLMError)
    known = isinstance(kind, type) and issubclass(kind, FastVLMError)
    error: FastVLMError = (kind if known else FastVLMError)(str(values["message"]))
    return error
