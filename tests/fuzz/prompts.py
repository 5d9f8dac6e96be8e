"""Prompts and conversations, and token ids that are turned back into text."""

import json
import unicodedata
from random import Random
from typing import Any

import numpy as np

from fastvlm_mlx.inputs.tokenizer_files import END_OF_TEXT, IM_END, IM_START
from tests.fuzz import damage
from tests.fuzz.room import Room
from tests.fuzz.subject import PICTURE, Wrong

_PIECES = (
    *(
        "a",
        "Was ist das?",
        "这是什么",
        "🐈‍⬛",
        "\u0301",
        "\u202e",
        "\0",
        "\t",
        " ",
        "\u00a0",
        "\r\n",
        "\n",
        "12,345",
        "'s",
    ),
    *(
        IM_START,
        IM_END,
        END_OF_TEXT,
        "<image>",
        "<|im_",
        "|>",
        "assistant\n",
        "<|",
        "\ufffd",
        "\ufeff",
        "\u2028",
        "\x1b[2J",
    ),
    *("a" * 300, "\U0010ffff", "ﬁ", "Å", "가", "\ud800", "\udfff"),
)


_PICTURE = "data:image/gif;base64,R0lGODdhAQABAIAAAP8AAAAAACwAAAAAAQABAAACAkQBADs="


def text(random: Random) -> str:
    """Some text: words, markup, control characters, halves of characters."""
    pieces = _PIECES[:-2] if random.random() < 0.8 else _PIECES
    return "".join(random.choice(pieces) for _ in range(random.choice((0, 1, 2, 5, 20))))


def prompt(random: Random, room: Room) -> None:
    """A text: its ids, without markup of ours in them, give it back."""
    processor = room.model(random.choice(("apple", "apple", "transformers")))[1]
    written = text(random)
    images = random.choice((0, 0, 1, 2))
    ids = processor.encode(written, images, **({"system": text(random)} if random.random() < 0.3 else {}))
    marks = [processor.tokenizer.token_id(mark) for mark in (IM_START, IM_END)]
    if [ids.count(mark) for mark in marks] != [3, 2]:
        raise Wrong("prompt: text became markup")
    if ids.count(-200) != images:
        raise Wrong(f"prompt: {ids.count(-200)} places for {images} images")
    plain = processor.tokenizer.encode(written)
    given = unicodedata.normalize("NFC", processor.decode(plain))
    if given != unicodedata.normalize("NFC", written):
        raise Wrong(f"prompt: {written[:80]!r} became {given[:80]!r}")
    streamed = processor.detokenizer()
    if "".join([*map(streamed.add, plain), streamed.finish()]) != processor.decode(plain):
        raise Wrong("prompt: the streamed text is another one")


def _conversation(random: Random) -> list[Any]:
    places = random.choice(
        (
            *({"type": "image"},) * 4,
            {"type": "image_url", "image_url": {"url": _PICTURE}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "image_url", "image_url": "/etc/passwd"},
            {"type": "image", "image": "http://127.0.0.1:1/x.png"},
            {"type": "image", "path": "x.png"},
            {"type": "image", "base64": "AAAA"},
            {"type": "text", "text": "more"},
        )
    )
    return [
        *([{"role": "system", "content": text(random)}] if random.random() < 0.4 else []),
        {"role": "user", "content": [places, {"type": "text", "text": "What is it?"}]},
        *(
            [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Where?"}]
            if random.random() < 0.5
            else []
        ),
    ]


def messages(random: Random, room: Room) -> None:
    """A conversation with values of the wrong kind in it."""
    talk: Any = _conversation(random)
    for _ in range(random.choice((0, 1, 1, 2))):
        talk = damage.some_value(random, talk) if isinstance(talk, (dict, list)) else damage.some_wrong(random)
    if random.random() < 0.1:
        place = random.choice(talk) if isinstance(talk, list) and talk else {}
        if isinstance(place, dict):
            place["content"] = random.choice(({1, 2}, b"bytes", [b"x"], object(), ("a",), iter([]), PICTURE, [PICTURE]))
    processor = room.model(random.choice(("apple", "apple", "transformers")))[1]
    images = [PICTURE] * json.dumps(talk, default=str).count('"image"}')
    if random.random() < 0.3:
        images = random.choice((None, PICTURE, [PICTURE, PICTURE], [], [None]))
    inputs = processor(images, talk, resolution=64, **({"system": "Be brief."} if random.random() < 0.2 else {}))
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values", np.zeros((0,)))
    if ids.dtype != np.int32 or (ids == -200).sum() != len(pixels):
        raise Wrong(f"messages: {(ids == -200).sum()} places for {len(pixels)} images")


def ids(random: Random, room: Room) -> None:
    """Token ids, possible and impossible ones, as text."""
    processor = room.model(random.choice(("apple", "apple", "transformers")))[1]
    some = [random.choice((random.randrange(400), -200, -1, 10**6, 2**31, 2**64, 369, 370)) for _ in range(9)]
    rows: Any = random.choice(
        (some, tuple(some), np.array([i % 400 for i in some]), iter(some), [], json.loads(json.dumps(some)))
    )
    if random.random() < 0.2:
        rows = random.choice((None, 5, "text", [None], ["x"], [1.5], [[1]], b"ab", [True]))
    decoded = processor.decode(rows)
    if not isinstance(decoded, str):
        raise Wrong(f"ids: decoded to a {type(decoded).__name__}")
