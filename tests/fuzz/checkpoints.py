"""Damaged checkpoints: upstream folders, converted folders, entries of the cache, archives."""

import json
import zipfile
from pathlib import Path
from random import Random

from fastvlm_mlx.convert import plan, quantize_checkpoint, verify
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.quantize.scheme import Quantization
from tests.fuzz import damage
from tests.fuzz.room import CONVERTED, UPSTREAM, Room
from tests.fuzz.subject import FastVLMError, Wrong, ask, command, convert_checkpoint, load, usable

_ROOTS = ("", "inside/", "a/b/c/", "../", "/", "C:\\", "é/", "x" * 200 + "/")
_MEMBERS = (
    *("config.json", "other/config.json", "../../evil.json", "/etc/evil.json", "a" * 300 + ".json", "x\ny.json"),
    *("__MACOSX/._config.json", "._model.safetensors", "model.bin", "LICENSE", "LICENSE/x.json", "\x1b[2J.txt"),
    *("model-2.safetensors", "sub/more.json", "merges.txt", "NOTICE" + "\u202e", "tokenizer.json/", "."),
)
DTYPES = ("float32", "float32", "float32", "float16", "bfloat16")


def upstream(random: Random, room: Room) -> None:
    """A damaged folder as others publish it."""
    names = [name for name in UPSTREAM for _ in range(1 if name in ("demo", "apple-hot") else 4)]
    folder = room.upstream(random.choice(names))
    damage.damage_folder(random, folder)
    room.watch(folder)
    match random.choices(("convert", "plan", "load", "info", "verify"), (60, 12, 16, 10, 2))[0]:
        case "convert":
            convert_checkpoint(folder, room.out, dtype=random.choice(DTYPES))
            room.written.add(room.out)
            usable(room.out)
        case "plan":
            str(plan(folder, dtype=random.choice(DTYPES)))
        case "load":
            ask(load(folder))
        case "info":
            command(["info", str(folder), *random.choice(((), ("--json",)))])
        case "verify":
            verify(room.watch(room.converted("apple in float32")), folder)


def converted(random: Random, room: Room) -> None:
    """A damaged folder of this project's format."""
    folder = room.converted(random.choice(list(CONVERTED)))
    damage.damage_folder(random, folder)
    room.watch(folder)
    match random.choices(("load", "info", "convert", "quantize", "verify", "export"), (65, 14, 12, 3, 3, 3))[0]:
        case "load":
            ask(load(folder, lazy=random.random() < 0.3))
        case "info":
            command(["info", str(folder), *random.choice(((), ("--json",)))])
        case "convert":
            convert_checkpoint(folder, room.out, dtype=random.choice(DTYPES), dequantize=random.random() < 0.3)
            room.written.add(room.out)
            usable(room.out)
        case "quantize":
            quantize_checkpoint(folder, room.out, Quantization(bits=8, group_size=32))
            room.written.add(room.out)
            usable(room.out)
        case "verify":
            verify(
                folder, room.watch(room.converted("apple in float32")) if folder.name != "apple-in-float32" else folder
            )
        case "export":
            export_mlx_vlm(folder, room.out)
            room.written.add(room.out)


def cache(random: Random, room: Room) -> None:
    """A model whose folder in the cache was damaged: it is made again, by `load` or by the command that notices."""
    folder = room.watch(room.upstream(random.choice(("apple", "transformers", "mlx-vlm-q8"))))
    load(folder, lazy=True)
    (entry,) = (path for path in room.cache.iterdir() if path.is_dir())
    damage.damage_folder(random, entry)
    try:
        loaded = load(folder)
    except FastVLMError as error:
        raise Wrong(f"cache: not made again: {str(error)[:300]!r}") from error
    try:
        ask(loaded)
    except FastVLMError:  # the tokenizer's files and each weight are first looked at by a question
        command(["generate", "-m", str(folder), "-p", "What is it?", "-n", "1"])
        ask(load(folder))


def archive(random: Random, room: Room) -> None:
    """A damaged checkpoint in an archive, or a damaged or crafted archive."""
    folder = room.upstream(random.choice([name for name in UPSTREAM if name not in ("demo", "apple-hot")]))
    if random.random() < 0.25:
        damage.damage_folder(random, folder)
    path = room.input / "checkpoint.zip"
    _pack(random, folder, path)
    if random.random() < 0.55:
        damage.write(path, _damaged_archive(random, path.read_bytes()))
    room.watch(path)
    if random.random() < 0.2:
        str(plan(path))
        return
    convert_checkpoint(path, room.out, dtype="float32")
    room.written.add(room.out)
    usable(room.out)


def _pack(random: Random, folder: Path, path: Path) -> None:
    """Writes an archive with the files of `folder`, and now and then with members that do not belong there."""
    root = random.choice(_ROOTS)
    kinds = (zipfile.ZIP_STORED,) * 6 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name.isprintable():  # an archive's names are Unicode
                kind = random.choice(kinds) if file.stat().st_size < 50_000 else random.choice(kinds[:7])
                packed.write(file, f"{root}{file.name}", kind, compresslevel=1)
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            name = random.choice((random.choice(_MEMBERS), f"{root}{random.choice(_MEMBERS)}"))
            if name not in packed.namelist():
                contents = (
                    bytes(70_000_000) if random.random() < 0.02 else random.choice((b"", b"{}", bytes(999), b"\xff"))
                )
                packed.writestr(name, contents, zipfile.ZIP_DEFLATED)
        if random.random() < 0.03:
            for number in range(300):
                packed.writestr(f"{root}many-{number}.json", json.dumps(number), zipfile.ZIP_DEFLATED)


def _damaged_archive(random: Random, data: bytes) -> bytes:
    """Damage to the directory at the end of an archive, to the header of a member, or anywhere."""
    start = data.rfind(b"PK\x01\x02") if random.random() < 0.5 else data.find(b"PK\x01\x02")
    match random.randrange(5):
        case 0:
            return some_part(random, data, max(start, 0), len(data))
        case 1:
            at = data.find(b"PK\x03\x04", random.randrange(len(data)))
            return some_part(random, data, max(at, 0), max(at, 0) + 60)
        case 2:
            at = start + random.choice((6, 8, 10, 16, 20, 24, 28, 30, 32, 42))  # fields of the directory's entry
            field = random.choice(
                (b"\0\0", b"\xff\xff", b"\x01\0", b"\x0c\0", b"\x0e\0", b"\xff\xff\xff\xff", b"\0\x08")
            )
            return data[:at] + field + data[at + len(field) :]
        case 3:
            return random.choice(
                (data[: random.randrange(len(data))], data + b"\0" * 99, b"#!x\n" + data, data[4:], b"")
            )
        case _:
            return damage.some_bytes(random, data)


def some_part(random: Random, data: bytes, start: int, end: int) -> bytes:
    """`data` with damage between two places."""
    return data[:start] + damage.some_bytes(random, data[start:end]) + data[end:]
