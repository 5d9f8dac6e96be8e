"""The command line."""

from random import Random
from typing import Any

import typer.main

from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import app, command

_TEXTS = (
    *("", " ", "x", "-", "-1", "0", "1", "2", "64", "65", "nan", "inf", "1e400", "9" * 400, "٣", "½", "é", "\ud800"),
    *("two\nlines", "\x1b[2J", "a" * 2000, "~nosuchuser/x", "--nosuch", "auto", "float16", "/", "."),
)
_SKIPPED = (
    *("--help", "--upload-repo", "--random-weights", "--cold", "--runs", "--warmup", "--repeat", "--open"),
    *("--q-method", "--q-preset", "--target-bpw"),
)
"""Options that ask the network, take long, or are set already."""


def command_line(random: Random, room: Room) -> None:
    """A command with options that do not fit, missing files, and a destination that is taken."""
    folder, picture, questions = str(room.folder("apple")), room.input / "a.png", room.input / "q.jsonl"
    picture.write_bytes(files()["PNG RGB 4"])
    questions.write_text('{"image": "a.png", "question": "What?", "answers": ["x"]}\n')
    right: dict[str, list[str]] = {
        "generate": [str(picture), "-m", folder, "-n", "1"],
        "caption": [str(room.input), "-m", folder, "-n", "1", "-o", "captions.jsonl"],
        "convert": [folder, str(room.out)],
        "quantize": [folder, str(room.out), "--q-group-size", "32"],
        "eval": ["-m", folder, "--data", str(questions), "-n", "1"],
        "info": [folder],
        "verify": [folder, "--against", folder],
        "bench": ["-m", folder, "--runs", "1", "--warmup", "0"],
        "search": [str(room.input), "a cat", "-m", folder, "-r", "64", "--no-captions"],
    }
    (name,) = random.choices(list(right), (6, 3, 3, 2, 3, 3, 1, 1, 3))
    texts = [*_TEXTS, str(room.input), str(picture), str(room.out)]
    if name in ("caption", "search"):
        texts.remove("/")  # a whole disk takes minutes
    arguments = [name, *right[name]]
    for _ in range(random.choice((0, 1, 1, 2))):
        option, flag = random.choice(_options(name))
        arguments += [option] if flag else [option, random.choice(texts)]
    if name != "bench" and random.random() < 0.35:
        arguments[random.randrange(1, len(arguments))] = random.choice(texts)
    command(arguments, stdin=random.choice((b"", b"What?", b"\xff", files()["PNG RGB 4"])))
    results = (room.out, *room.work.rglob("*"), *room.home.rglob("*"))
    room.written.update(path for path in results if path.exists())


def _options(name: str) -> list[tuple[str, bool]]:
    """The options of a command, each with whether it takes no value."""
    commands: Any = typer.main.get_command(app)
    found = []
    for parameter in commands.commands[name].params:
        if parameter.param_type_name == "option" and parameter.opts[0] not in _SKIPPED:
            found += [(option, parameter.is_flag) for option in (*parameter.opts, *parameter.secondary_opts)]
    return found
