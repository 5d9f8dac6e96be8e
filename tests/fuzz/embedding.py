"""Descriptions that are written into damaged pictures, and into pictures with made-up headers."""

from pathlib import Path
from random import Random

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.inputs.formats import open_image, quiet
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.jobs.embedded import embed, read_embedded
from fastvlm_mlx.jobs.sidecars import Outcome
from fastvlm_mlx.jobs.xmp import read_xmp
from tests.fuzz import damage
from tests.fuzz.headers import made_up
from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import Wrong

_TEXTS = ("A dog.", "Ä “dog” <&>\n犬", "", "\0\ud800\ufffe", "x" * 70_000)
_OTHERS = (b"", b"mine", b"\xff\xd9", b"\0" * 9, b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", b"XMP \4\0\0\0mine")


def _encoded(random: Random) -> bytes:
    if random.random() < 0.2:
        return made_up(random)
    data = random.choice([data for name, data in files().items() if name.startswith(("JPEG", "PNG", "WEBP"))])
    if random.random() < 0.2:
        return data + random.choice(_OTHERS)
    return damage.some_bytes(random, data) if random.random() < 0.8 else data


def _pixels(data: bytes) -> tuple[object, ...]:
    with quiet, open_image(Encoded(data, "")) as image:
        return image.mode, image.size, image.tobytes()


def embedding(random: Random, room: Room) -> None:
    """A picture has the description and its own pixels, or is as it was."""
    path = Path(room.input / "a.jpg")
    path.write_bytes(before := _encoded(random))
    room.written.add(room.input)
    text = random.choice(_TEXTS)
    try:
        outcome, _ = embed(str(path), text, generator="fastvlm-mlx", overwrite=random.random() < 0.5)
    except FastVLMError as error:
        if path.read_bytes() != before:
            raise Wrong(f"changed: {type(error).__name__} after the picture was written") from error
        raise
    after = path.read_bytes()
    if (after != before) is not (outcome is Outcome.WRITTEN):
        raise Wrong(f"changed: {outcome}")
    if outcome is not Outcome.WRITTEN:
        return
    if _pixels(before) != _pixels(after):
        raise Wrong("changed: the pixels of a picture")
    if text == _TEXTS[0] and read_xmp(read_embedded(after)).description != text:
        raise Wrong("not read back: the description")
