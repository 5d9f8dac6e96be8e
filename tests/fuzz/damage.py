"""Seeded damage: to bytes, to JSON and its values, to safetensors files, and to the files of a folder."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DEEP, DIGITS, TWICE = "\0deep", "\0digits", "\0twice"
"""Values that stand for JSON which Python cannot write: deep nesting, a number of 5,000 digits, a key that repeats."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1000, 2**31, 2**32, 2**63, 2**64, 10**12, 10**30, 10**400),
    *(0.0, -0.5, 0.5, 1.5, 1e-320, 1e-45, 1e39, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "x", "8", "-1", "nan", "é", "\ud800", "\x1b[2J\x07", "two\nlines", "\u202e", "a" * 5000, "../up", "/"),
    *([], [1], [None], ["a", 1], [[]], [1.5] * 5, [10**30] * 25, {}, {"a": 1}, {"": None}, [{}] * 3),
    *(DEEP, DIGITS, TWICE),
)
"""Values of the wrong kind, out of range, or strange."""


def some_wrong(random: Random) -> Any:
    """One of `VALUES`, which may be changed."""
    return copy.deepcopy(random.choice(VALUES))


def some_bytes(random: Random, data: bytes) -> bytes:
    """A copy with one to four places changed."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        length = random.choice((1, 1, 2, 4, 16, 256))
        match random.randrange(9):
            case 0 | 1 | 2 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 3 if at < len(changed):
                changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 4:
                changed[at:at] = random.randbytes(length)
            case 5:
                del changed[at : at + length]
            case 6:
                changed[at : at + length] = bytes([random.choice((0, 255))]) * length
            case 7:
                changed[at:at] = changed[at : at + length]
            case 8:
                del changed[at:]
    return bytes(changed)


def some_value(random: Random, value: Any) -> Any:
    """`value` with one of the values in it changed; containers are changed in place."""
    places = _places(value)
    if not places:
        return some_wrong(random)
    container, key = random.choice(places)
    old = container[key]
    choice = random.random()
    if choice < 0.15 and isinstance(old, (int, float)) and not isinstance(old, bool):
        container[key] = random.choice(
            (old + 1, old - 1, old * 2, old * 64, -old, old * 0.5 if abs(old) < 2**99 else old // 2, str(old))
        )
    elif choice < 0.25:
        del container[key]
    elif choice < 0.32 and isinstance(container, dict):
        container[random.choice(("", "x", f"{key}_", f"{key}\n", "\ud800", "a" * 300))] = container.pop(key)
    elif choice < 0.40:
        other, name = random.choice(places)
        container[key] = json.loads(json.dumps(other[name]))
    else:
        container[key] = some_wrong(random)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if isinstance(container[key], (dict, list))]
    return found


def to_json(value: Any) -> bytes:
    """JSON with the values that Python cannot write."""
    text = json.dumps(value)
    raw = {DEEP: "[" * 20_000 + "]" * 20_000, DIGITS: "9" * 5000, TWICE: '{"a": 1, "a": 2}'}
    for name, inserted in raw.items():
        text = text.replace(json.dumps(name), inserted)
    return text.encode()


def some_json(random: Random, data: bytes) -> bytes:
    """JSON with one to three values changed; sometimes text that is no JSON."""
    if random.random() < 0.12:
        odd = (
            *(b"", b"null", b"[]", b"{", b'"text"', b"[" * 100_000, b'{"a":' * 30_000, data[: len(data) // 2]),
            *(b"\xef\xbb\xbf" + data, b"\xff\xfe" + data[:9], data.replace(b"{", b"{\n//\n", 1)),
            data.decode().encode("utf-16"),
        )
        return random.choice(odd)
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = some_value(random, value) if isinstance(value, (dict, list)) else some_wrong(random)
    return to_json(value)


def some_lines(random: Random, data: bytes) -> bytes:
    """Text with lines doubled, exchanged, left out or changed."""
    lines = data.split(b"\n")
    for _ in range(random.choice((1, 2, 5))):
        one, other = random.randrange(len(lines)), random.randrange(len(lines))
        match random.randrange(5):
            case 0:
                lines.insert(one, lines[other])
            case 1:
                lines[one], lines[other] = lines[other], lines[one]
            case 2 if len(lines) > 1:
                del lines[one]
            case 3:
                lines[one] = some_bytes(random, lines[one])
            case _:
                lines[one] = random.choice((b"", b" ", b"a" * 100_000, b"\xff\xfe", b"a b c d", "\u2028x".encode()))
    return b"\n".join(lines)


def some_tensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with damage to its length, header, entries or data."""
    end = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:end]), data[end:]
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry, other = header[name], header[random.choice(names)]
    match random.randrange(14):
        case 0:
            return some_bytes(random, data[:end]) + tensors
        case 1:
            return data[: random.choice((0, 4, 8, end - 1, end, random.randrange(len(data)), len(data) - 1))]
        case 2:
            return random.choice((b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4" * 20, b"", data + b"\0"))
        case 3:
            size = random.choice((0, 1, 2, end, 2**31, 2**63, 2**64 - 1))
            return size.to_bytes(8, "little") + data[8:]
        case 4:
            entry["dtype"] = random.choice(("F16", "BF16", "F64", "I8", "I64", "U32", "BOOL", "F4", "", None, 5))
        case 5:
            entry["shape"] = random.choice(
                ([], [0], entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1], [10**300] * 25, [-1], ["8"])
            )
        case 6:
            entry["data_offsets"] = random.choice(
                ([0], [0, 4, 8], ["0", "4"], [math.inf] * 2, [4, 0], [0, 2**63], {}, 5)
            )
        case 7:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 8:
            header[random.choice((f"{name}x", "a" * 3000, "\ud800", "\x1b[31m\n", "", "model.extra"))] = header.pop(
                name
            )
        case 9:
            del header[name]
        case 10 | 11:
            start, stop = entry["data_offsets"]
            at = start + random.randrange(max(1, (stop - start) // 4)) * 4
            bits = random.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", random.randbytes(4))
            )
            count = random.choice((1, 1, max(1, (stop - at) // 4)))
            tensors = tensors[:at] + (bits * count)[: stop - at] + tensors[min(stop, at + 4 * count) :]
        case _:
            header = some_value(random, header)
    text = to_json(header)
    return len(text).to_bytes(8, "little") + text + tensors


def write(path: Path, data: bytes) -> None:
    """Writes a file anew, so that other links to it keep what they have."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def damage_file(random: Random, path: Path) -> None:
    """Damages a file as its kind is most likely to be damaged."""
    kinds: dict[str, Callable[[Random, bytes], bytes]] = {
        ".json": some_json,
        ".safetensors": some_tensors,
        ".txt": some_lines,
    }
    damage = kinds.get(path.suffix, some_bytes) if random.random() < 0.85 else some_bytes
    write(path, damage(random, path.read_bytes()))


_STRANGERS = ("._model.safetensors", "model-2.safetensors", "other.safetensors", "\udcff.safetensors", ".DS_Store")
_OPTIONAL = (
    *("model.safetensors.index.json", "generation_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "LICENSE", "README.md"),
)
_CONTENTS = (b"", b"{}", b"[]", b'{"weight_map": {"a": "b"}}', b'{"weight_map": {"a": 5}}', b"\xff" * 9)


def _exchange(random: Random, folder: Path, path: Path) -> None:
    """Removes, renames, links or replaces a file, or adds another one."""
    other = random.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    match random.randrange(9):
        case 0:
            path.unlink()
        case 1:
            path.rename(folder / random.choice((f"{path.name}.bak", f".{path.name}", path.name.upper(), "x" * 200)))
        case 2:
            path.unlink()
            path.symlink_to(random.choice(("nowhere", path.name, ".", "/dev/null", str(folder.parent))))
        case 3:
            path.unlink()
            path.mkdir()
        case 4:
            write(path, other.read_bytes())
        case 5:
            write(path, b"")
        case 6:
            write(folder / random.choice(_STRANGERS), random.choice((b"", bytes(99), other.read_bytes())))
        case 7:
            write(folder / random.choice(_OPTIONAL), random.choice((*_CONTENTS, to_json(random.choice(VALUES)))))
        case 8:
            added = folder / random.choice(
                ("LICENSE", "generation_config.json", "tokenizer.json", "model-1.safetensors")
            )
            added.unlink(missing_ok=True)
            added.mkdir()


def damage_folder(random: Random, folder: Path) -> None:
    """Damages one or two files of a checkpoint, config.json and the weights more often than others."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    often = {"config.json": 8, "model.safetensors": 8, "tokenizer.json": 2, "tokenizer.bin": 2}
    weights = [often.get(file.name, 1) for file in files]
    for path in dict.fromkeys(random.choices(files, weights, k=random.choice((1, 1, 1, 2)))):
        if random.random() < 0.2:
            _exchange(random, folder, path)
        elif path.is_file() and not path.is_symlink():
            damage_file(random, path)
