"""The ways to hand over a picture: arrays, paths, URLs, bytes, open files, PIL images."""

import base64
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.backend import mx
from tests.fuzz import damage
from tests.fuzz.pictures import drawing, files
from tests.fuzz.room import Room
from tests.fuzz.subject import look_at

_KINDS = ("u1", "f4", "f8", "f2", *"i1 u2 i4 i8 u8 f16 c8 ? O S3 U2 M8[s] m8[s]".split())
_NAMES = (
    *("", " ", "~", "~nosuchuser/x.png", "\ud800", "x" * 5000, "a\0b", "/dev/null", "/proc/self/mem", "C:\\x.png", "-"),
    *("file:///etc/passwd", "ftp://localhost/x", "gopher://x", "http://", "http://[", "https://\0/", "http://a b/"),
    *("http://localhost:99999/", "http://127.0.0.1:1/x.png", "HTTP://[::1]:x/", "A" * 200, b"\xff", Path(), Path("~")),
)
_MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "La",
    "CMYK",
    "YCbCr",
    "HSV",
    "I",
    "F",
    "I;16",
    "LAB",
)


def array(random: Random, room: Room) -> None:
    """An array of any type, shape and range."""
    shape: tuple[int, ...] = random.choice(((9, 7, 3), (9, 7), (9, 7, 1), (9, 7, 4), (1, 1, 3)))
    if random.random() < 0.3:
        shape = random.choice(((9, 7, 2), (3, 9, 7), (0, 7, 3), (), (5,), (1, 9, 7, 3), (70_000, 1)))
    kind = random.choice(_KINDS)
    fill = random.choice((0, 1, 0.5, -1, 255, 256, float("nan"), float("inf"), 1e300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = np.full(shape, fill).astype(kind)
    match random.randrange(9):
        case 0 if values.ndim >= 2:
            look_at(values[::-1, ::-1])
        case 1:
            look_at(np.asfortranarray(values))
        case 2 if kind in ("u1", "f4"):
            look_at(mx.array(values))
        case 3 if kind == "f4":
            look_at(mx.array(values).astype(random.choice((mx.float16, mx.bfloat16))))
        case 4:
            look_at(np.ma.masked_array(values))
        case 5:
            look_at(np.broadcast_to(values, (2, *shape)))
        case 6:
            look_at(_Array(random.choice((values, None, "text", [1], ValueError("no")))))
        case _:
            look_at(values)


class _Array:
    """An object that says it is an array."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class _File:
    """An open file that gives the answers it was made with."""

    def __init__(self, answers: list[Any], name: Any, seekable: Any) -> None:
        self.answers, self.name, self._seekable = answers, name, seekable

    def seekable(self) -> bool:
        if isinstance(self._seekable, Exception):
            raise self._seekable
        return bool(self._seekable)

    def seek(self, *_: Any) -> int:
        return 0

    def read(self, *_: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else b""
        if isinstance(answer, Exception):
            raise answer
        return answer


def _open_file(random: Random, room: Room, png: bytes) -> Any:
    path = room.input / "picture.png"
    path.write_bytes(png)
    buffer = io.BytesIO(png)
    match random.randrange(8):
        case 0:
            buffer.close()
        case 1:
            buffer.seek(random.randrange(len(png) + 9))
        case 2:
            return io.StringIO("text")
        case 3:
            with path.open("rb") as file:
                return file
        case 4:
            with (room.input / "written").open("wb") as written:
                look_at(written)
        case 5 | 6:
            odd = (png, b"", "text", None, 5, OSError("gone"), ValueError("no"), bytearray(png), memoryview(png))
            names = ("x", 5, None, b"\xff", "a" * 5000, "\x1b[2J")
            return _File([random.choice(odd)], random.choice(names), random.choice((True, False, OSError("no"))))
    return buffer


def _path(random: Random, room: Room, png: bytes) -> Any:
    path = room.input / random.choice(("picture.png", "wei rd\n\x1b.png", "~", "a" * 200, "\udcff.png", "\u202e.png"))
    path.write_bytes(png)
    own = (path, str(path), os.fsencode(path), path.parent, path / "below", f"{path}x", f"{path}\0", path.name)
    return random.choice((*own, *_NAMES, base64.b64encode(png).decode()))


def _data_url(random: Random, room: Room, png: bytes) -> str:
    kinds = ("data:image/png;base64,", "DATA:;base64,", "data:,", "data:", "data:image/png,", "data:;BASE64;x=y,")
    text = base64.b64encode(png).decode()
    if random.random() < 0.3:
        text = damage.some_bytes(random, text.encode()).decode(errors="replace")
    else:
        odd = (
            text[:-1],
            text + "=",
            f" {text}\n",
            "%FF%00",
            "%",
            "%zz",
            "\ud800",
            "é",
            "=" * 9,
            text.replace("A", "-"),
            "",
        )
        text = random.choice((text, *odd))
    return random.choice((kinds[0], *kinds)) + text


def _pillow(random: Random, room: Room, png: bytes) -> Any:
    match random.randrange(8):
        case 0:
            return Image.open(io.BytesIO(png[: random.randrange(60, len(png))]))
        case 1:
            image = Image.open(io.BytesIO(png))
            image.close()
            return image
        case 2:
            return Image.new("RGB", random.choice(((0, 0), (0, 5), (1, 1), (1, 3000), (3000, 1))))
    mode = random.choice(_MODES)
    made = Image.new(mode, (9, 7)) if mode in ("I;16", "LAB", "PA", "La", "RGBa") else drawing("RGB").convert(mode)
    infos = (
        {},
        {"exif": random.randbytes(30)},
        {"exif": 5},
        {"transparency": 300},
        {"icc_profile": b"x"},
        {"dpi": None},
    )
    made.info = random.choice(infos)
    return made


def _bytes(random: Random, room: Room, png: bytes) -> Any:
    views = (memoryview(png), memoryview(png)[::2], memoryview(bytes(12)).cast("I"))
    return random.choice((png, bytearray(png), *views, b"", bytearray()))


def _anything(random: Random, room: Room, png: bytes) -> Any:
    return random.choice((None, 5, 1.5, True, [], [png], {}, {"url": "x"}, object(), Image, np.float32(1), len, ...))


def source(random: Random, room: Room) -> None:
    """Any way to name a picture: a path, a URL, bytes, an open file, a PIL image."""
    make: Callable[[Random, Room, bytes], Any] = random.choice(
        (_path, _path, _open_file, _data_url, _pillow, _bytes, _anything)
    )
    look_at(make(random, room, files()["PNG RGB 4"]))
