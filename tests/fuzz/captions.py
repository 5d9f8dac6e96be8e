"""Folders that are captioned twice, with damage to what the first run wrote and to what people had written before."""

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import damage
from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import Refused, Wrong, command

_SIDECARS = (
    *(
        b"",
        b"mine\n",
        b"\xff\xfe",
        b"a" * 10_000,
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        b"<!DOCTYPE x [<!ENTITY a 'b'>]>&a;",
    ),
    *(b"<a>" * 5000, b"<?xml version='1.0' encoding='utf-16'?><a/>", b"\0" * 50),
)
_RECORDS = (b"", b"[]", b"5", b"{}", b'{"fingerprint": 5}', b"\xff", b"[" * 50_000, b"\0" * 50)


def _people_wrote(random: Random, pictures: Path) -> dict[Path, bytes]:
    """Pictures, some of them damaged, and texts beside them."""
    saved = list(files().values())
    contents = {}
    for name in ("a.png", "b c.jpg", "sub/é.png"):
        path = pictures / name
        path.parent.mkdir(exist_ok=True)
        contents[path] = random.choice(saved) if random.random() < 0.7 else random.choice((b"", b"x", saved[0][:50]))
        if random.random() < 0.3:
            contents[path.with_suffix(random.choice((".txt", ".xmp", ".png.xmp")))] = random.choice(_SIDECARS)
    for path, content in contents.items():
        path.write_bytes(content)
    return contents


def _some_records(random: Random, data: bytes) -> bytes:
    """Captions with a damaged record, or without their end."""
    lines = data.rstrip(b"\n").split(b"\n")
    place = random.randrange(len(lines))
    line = lines[place]
    lines[place] = random.choice((damage.some_json(random, line), line[: len(line) // 2], random.choice(_RECORDS)))
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b""))


def _lines(output: Path) -> list[Any]:
    found = []
    for line in output.read_bytes().split(b"\n"):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):  # what is no record stays
            continue
    return [record for record in found if isinstance(record, dict)]


def captions(random: Random, room: Room) -> None:
    """Every picture gets a caption or a reason, and nothing that people wrote is changed."""
    pictures = room.input / "pictures"
    pictures.mkdir()
    before = _people_wrote(random, pictures)
    output = room.work / "captions.jsonl"
    options = ["--txt", "--xmp", "--hf", "--dry-run", "--keep-openings", "--retry-errors"]
    more = ["--csv", str(room.work / "table.csv")] if random.random() < 0.3 else []
    arguments = ["caption", str(pictures), "-m", str(room.folder("apple")), "-r", "64", "-n", "1", "-o", str(output)]
    arguments += [*more, *(option for option in options if random.random() < 0.2)]
    room.written.update((room.work, room.input))
    try:
        command(arguments)
        if output.exists() and random.random() < 0.7:
            changed = _some_records(random, output.read_bytes())
            output.write_bytes(changed)
            try:
                command(arguments)
            except Refused:
                if not changed.startswith(output.read_bytes()):  # a torn last line goes
                    raise Wrong("changed: captions that were refused") from None
                raise
    finally:
        for path, content in before.items():
            has_text = content.strip() and path.suffix != ".xmp"  # captions are added to what is XMP
            if has_text and path.read_bytes() != content:
                raise Wrong(f"changed: {path.name}, which the program did not write")
    if output.exists():
        named = {str(record.get("file")) for record in _lines(output)}
        wanted = {str(path.relative_to(pictures)) for path in before if path.suffix in (".png", ".jpg")}
        if not wanted <= named:
            raise Wrong(f"captions: none for {wanted - named}")
