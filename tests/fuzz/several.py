"""Files that hold several pictures, whole and with damaged bytes, and the names that stand for their parts."""

import functools
import io
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.inputs.fragments import Fragment, page_ranges
from fastvlm_mlx.inputs.images import load_image
from fastvlm_mlx.inputs.named import is_plain, kind_of
from fastvlm_mlx.inputs.pages import draw_pages
from fastvlm_mlx.inputs.video import open_stream
from fastvlm_mlx.inputs.views import Choice, View, views
from tests import films, pdfs
from tests.fuzz import damage
from tests.fuzz.room import Room
from tests.fuzz.subject import Wrong, check_message

_FILMS = (
    *(("film.mp4", "libx264", 0), ("turned.mov", "libx264", 90), ("film.mkv", "libx264", 0), ("film.ts", "libx264", 0)),
    *(("film.avi", "mpeg4", 0), ("film.flv", "libx264", 0), ("film.h264", "libx264", 0), ("film.nut", "ffv1", 0)),
    *(("film.webm", "libvpx-vp9", 0), ("film.mov", "png", 0), ("film.wmv", "wmv2", 0)),
)
_MOST = 40
"""Pictures that are looked at in one case."""
_FRAGMENTS = (
    *("", "#1", "#2-3", "#1,1,2", "#2-", "#0", "#99999", "#1-999999999", "#page=1", "#t=0", "#t=0.3", "#t=0.1,0.5"),
    *("#t=,0.4", "#t=0.2,", "#t=9999", "#t=0:00:00.4", "#t=5,2", "#t=-1", "#t=1e3", "#x", "#", "##1", "#t=1#2"),
    *("#" + "1," * 3000 + "1", "#t=" + "9" * 9, "#٣", "#t=\ud800", "#\0", "#1\n"),
)


@functools.cache
def _films(folder: str) -> dict[str, bytes]:
    """A small film of each kind."""
    place = Path(folder)
    made = {}
    for name, codec, rotation in _FILMS:
        films.write(place / name, [number / 10 for number in range(12)], codec=codec, rotation=rotation)
        made[name] = (place / name).read_bytes()
        (place / name).unlink()
    return made


@functools.cache
def _animations() -> dict[str, bytes]:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    made = {}
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=[50, 0, 300])
        made[f"moving.{kind.lower()}"] = buffer.getvalue()
    return made


@functools.cache
def _documents() -> dict[str, bytes]:
    colours = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)]
    return {
        "paper.pdf": pdfs.pdf(colours, (200, 100)),
        "turned.pdf": pdfs.pdf(colours[:1], (60, 90), extra="/Rotate 90/UserUnit 3"),
        "wide.pdf": pdfs.pdf(colours[:2], (28_346, 3)),
        "locked.pdf": pdfs.locked(),
        "empty.pdf": pdfs.pdf([]),
    }


def _look(found: list[View]) -> None:
    """Raises `Wrong` unless each view is a picture with a name."""
    for view in found:
        image = np.asarray(load_image(view.source))
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise Wrong(f"shape: {image.shape}")
        if not view.name:
            raise Wrong("a picture without a name")


def _choice(random: Random) -> Choice:
    return Choice(
        frames=random.choice((None, None, 1, 3, 20_000)),
        every=random.choice((None, None, 0.2, 0.001, 1e6)),
        pages=random.choice((None, page_ranges("all"), page_ranges("2-3"))),
        whole=random.random() < 0.5,
        resolution=random.choice((64, 128)),
    )


def _try(random: Random, room: Room, source: Any) -> None:
    notes: list[str] = []
    try:
        _look(list(islice(views(source, _choice(random), notify=notes.append), _MOST)))
    finally:
        for note in notes:
            check_message(note)


def film(random: Random, room: Room) -> None:
    """A film of any kind with damaged bytes: some of its moments, or all of its frames."""
    name, data = random.choice(list(_films(str(room.work)).items()))
    if random.random() < 0.9:
        end = random.choice((64, 512, len(data)))
        data = damage.some_bytes(random, data[:end]) + data[end:]
    path = room.input / name
    path.write_bytes(data)
    match random.randrange(4):
        case 0:
            _try(random, room, data)
        case 1:
            rate, start = random.choice((None, 1, 7.5, 1000)), random.choice((0, 0.35, 3, 1e9))
            with open_stream(str(path), rate=rate, start=start, end=random.choice((None, start + 0.5))) as stream:
                last = -1.0
                for frame in islice(stream, _MOST):
                    if frame.pixels.dtype != np.uint8 or frame.pixels.ndim != 3 or not frame.time > last:
                        raise Wrong(f"frame: {frame.pixels.dtype} {frame.pixels.shape} at {frame.time} after {last}")
                    last = frame.time
        case _:
            _try(random, room, f"{path}{random.choice(_FRAGMENTS[:20])}")


def document(random: Random, room: Room) -> None:
    """A PDF or an animation with damaged bytes: some of its pages or moments."""
    name, data = random.choice([*_documents().items(), *_documents().items(), *_animations().items()])
    if random.random() < 0.9:
        data = damage.some_bytes(random, data)
    path = room.input / name
    path.write_bytes(data)
    if name.endswith("pdf") and random.random() < 0.03:
        for page in draw_pages(data, "messages[0]", most=random.choice((1, 16))):
            load_image(page)
    elif random.random() < 0.3:
        _try(random, room, data)
    else:
        _try(random, room, f"{path}{random.choice(_FRAGMENTS[:20])}")


def name(random: Random, room: Room) -> None:
    """Any name of a part or a device."""
    for found, data in (("paper.pdf", _documents()["paper.pdf"]), ("moving.gif", _animations()["moving.gif"])):
        (room.input / found).write_bytes(data)
    (room.input / "odd#2").write_bytes(_documents()["paper.pdf"])
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        os.environ.pop(variable, None)
    devices = ("@screen", "@clipboard", "@camera", "@window", "@test", "@", "lavfi:", "rtsp://", "rtsp://127.0.0.1:1")
    tails = (*("", ":", ":0", ":1", ":99999", ":\0", ":x", "\x1b[2J", ":" + "é" * 5000, "#2", "color=red"),)
    make: tuple[Callable[[], str], ...] = (
        lambda: random.choice(devices) + random.choice(tails),
        lambda: f"{room.input / random.choice(('paper.pdf', 'moving.gif', 'odd', 'odd#2'))}{random.choice(_FRAGMENTS)}",
        lambda: (
            random.choice(("https://127.0.0.1:1/a.pdf", "http://[", "data:application/pdf;base64,", "data:video/mp4,"))
            + random.choice(_FRAGMENTS)
        ),
    )
    named = random.choice(make)()
    if random.random() < 0.3:
        named = damage.some_bytes(random, named.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    Fragment.of(named.rpartition("#")[2])
    kind_of(named.encode("utf-8", "replace"))
    try:
        is_plain(named, animations=random.random() < 0.5)
    except FastVLMError as error:
        check_message(str(error))
    _try(random, room, named)
