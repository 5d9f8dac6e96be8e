"""The commands of a conversation: what begins with a slash and is no path."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from typing import NamedTuple

from fastvlm_mlx.chat.pictures import EXTENSIONS
from fastvlm_mlx.chat.settings import NAMES
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.formatting import printable

COMMANDS = {
    "/image": ("PATH or URL", "show a picture, film or PDF with the next question; also @clipboard, @screen"),
    "/images": ("", "list the pictures of this conversation"),
    "/undo": ("", "take back the last question and its answer"),
    "/retry": ("", "ask the last question again"),
    "/reset": ("", "forget all questions, answers and pictures"),
    "/system": ("TEXT", 'replace the system prompt; "" takes that back'),
    "/set": ("NAME=VALUE", "change a setting, such as temperature=0.7; alone, show them"),
    "/tokens": ("", "say how full the context is"),
    "/save": ("FILE", "write this conversation as JSON"),
    "/load": ("FILE", "go on with a conversation that was saved"),
    "/help": ("", "show this list"),
    "/quit": ("", "leave; so does Ctrl-D"),
}
"""What each command takes, and what it does."""
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/clear": "/reset", "/?": "/help", "/img": "/image"}
_COMMAND = re.compile(r"/[A-Za-z?]*(?=\s|$)")
_WITH_FILES = ("/image", "/save", "/load")


class Command(NamedTuple):
    """A command.

    Attributes:
        name: With its slash; a key of `COMMANDS`.
        rest: What stands behind it.
    """

    name: str
    rest: str


def is_command(line: str) -> bool:
    """Whether a line is meant as a command, be there one of that name or not."""
    return _COMMAND.match(line.strip()) is not None


def parse_command(line: str) -> Command | None:
    """The command that a line is; None if it is a question.

    Raises:
        PromptError: If there is no such command.
    """
    match = _COMMAND.match(line)
    if match is None:
        return None
    word = match[0].lower()
    name = _ALIASES.get(word, word)
    if name not in COMMANDS:
        near = get_close_matches(name, [*COMMANDS, *_ALIASES], 1, 0.5)
        hint = f"did you mean {_ALIASES.get(near[0], near[0])}?" if near else "/help lists what there is"
        raise PromptError(f"there is no command {printable(word, 40)}; {hint}")
    rest = line[match.end() :].strip()
    if not COMMANDS[name][0] and rest:
        raise PromptError(f"{name} takes nothing, not {printable(rest, 60)}")
    return Command(name, rest)


def complete(line: str) -> list[str]:
    """What the last word of a line may become: commands, settings, and paths with their blanks escaped."""
    start = _word_start(line)
    word = line[start:]
    command = line.split(None, 1)[0] if line.strip() else ""
    if start == 0 and word.startswith("/") and "/" not in word[1:]:
        names = [f"{name} " if COMMANDS[name][0] else name for name in COMMANDS if name.startswith(word)]
        return names or _paths(word, everything=False)
    if command == "/set" and start:
        return [f"{name}=" for name in NAMES if name.startswith(word)]
    if command in _WITH_FILES and start:
        return _paths(word, everything=command != "/image")
    return _paths(word, everything=False) if word.startswith(("/", "~", ".")) else []


def _word_start(line: str) -> int:
    """Where the last word begins; a blank behind a backslash is part of it."""
    return max((match.end() for match in re.finditer(r"(?<!\\)\s", line)), default=0)


def _paths(word: str, *, everything: bool) -> list[str]:
    """The paths that begin with a word: folders and pictures, or everything."""
    typed = re.sub(r"\\(.)", r"\1", word)
    folder, beginning = os.path.split(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(beginning) or (entry.name.startswith(".") and not beginning):
            continue
        is_picture = os.path.splitext(entry.name)[1][1:].lower() in EXTENSIONS
        if entry.is_dir() or is_picture or everything:
            path = os.path.join(folder, entry.name)
            found.append(_escaped(path) + ("/" if entry.is_dir() else " "))
    return found


def _escaped(path: str) -> str:
    return re.sub(r"([\s\\'\"])", r"\\\1", path)


def help_lines(columns: int) -> list[str]:
    """The list of commands, in lines of at most so many columns where that is possible."""
    heads = {name: f"{name} {takes}".rstrip() for name, (takes, _) in COMMANDS.items()}
    width = max(map(len, heads.values())) + 2
    if columns < width + 30:
        return [text for name, (_, does) in COMMANDS.items() for text in (heads[name], f"  {does}")]
    return [f"{heads[name]:<{width}}{does}" for name, (_, does) in COMMANDS.items()]
