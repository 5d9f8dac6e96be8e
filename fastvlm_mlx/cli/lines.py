"""Lines from a person or a program: history and completion at a terminal, long questions over several lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_QUOTES = '"""'
_MORE = "... "
_MOST_HISTORY = 1000


class Interrupted(Exception):
    """An interrupt while a line was awaited."""


class TerminalLines:
    """Lines that a person types.

    Args:
        history: The file of earlier lines; None keeps none.
        complete: Gives what the last word of a line may become.
    """

    def __init__(self, history: Path | None, complete: Callable[[str], list[str]]) -> None:
        self._history = history
        self._complete = complete
        self._candidates: list[str] = []
        self._new = 0
        self._readline: Any = None

    def __enter__(self) -> "TerminalLines":
        try:
            import readline
        except ImportError:  # a Python without it
            return self
        self._readline = readline
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self._completion)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        readline.set_auto_history(False)
        if not is_libedit:
            readline.parse_and_bind("set completion-ignore-case on")
            readline.parse_and_bind('"\\t": complete')
        readline.clear_history()
        if self._history is not None:
            with suppress(OSError):
                readline.read_history_file(self._history)
        return self

    def __exit__(self, *_: object) -> None:
        if self._readline is None:
            return
        self._readline.set_completer(None)
        if self._history is not None and self._new:
            with suppress(OSError):
                self._save(self._history)

    def _save(self, history: Path) -> None:
        """Adds the new lines to the file, which other conversations may have added to meanwhile."""
        import os

        os.close(os.open(history, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._readline.set_history_length(_MOST_HISTORY)
        if hasattr(self._readline, "append_history_file"):
            self._readline.append_history_file(self._new, history)
        else:
            self._readline.write_history_file(history)

    def _completion(self, text: str, state: int) -> str | None:
        """What readline asks for: one candidate after the other, without what stands before the part it knows."""
        if state == 0:
            line = self._readline.get_line_buffer()[: self._readline.get_endidx()]
            begin = self._readline.get_begidx()
            start = len(line) - len(text)
            words = self._complete(line)
            before = line[_word_start(line) : max(begin, start)]
            self._candidates = [word[len(before) :] for word in words if word.startswith(before)]
        return self._candidates[state] if state < len(self._candidates) else None

    def read(self, prompt: str) -> str | None:
        """The next question, which may have several lines; None at the end.

        Raises:
            Interrupted: At an interrupt.
            UnicodeDecodeError: If it is no text.
        """
        try:
            text = _joined(input, prompt)
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt as err:
            sys.stdout.write("\n")
            raise Interrupted from err
        if self._readline is not None and text.strip():
            self._readline.add_history(text.replace("\n", " "))
            self._new += 1
        return text


def _word_start(line: str) -> int:
    """Where the last word begins; a blank behind a backslash is part of it."""
    place = len(line)
    while place > 0 and not (line[place - 1].isspace() and line[place - 2 : place - 1] != "\\"):
        place -= 1
    return place


def _joined(read: Callable[[str], str], prompt: str) -> str:
    r"""A question: one line; several, each but the last with a `\` at its end; or what stands between two \"\"\".

    Raises:
        EOFError: If there is nothing more.
    """
    line = read(prompt)
    if line.lstrip().startswith(_QUOTES):
        text = line.lstrip()[len(_QUOTES) :]
        while _QUOTES not in text:
            try:
                text += "\n" + read(_MORE)
            except EOFError:
                return text
        return text.partition(_QUOTES)[0].strip("\n")
    lines = [line]
    while lines[-1].endswith("\\") and not lines[-1].endswith("\\\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read(_MORE))
        except EOFError:
            break
    return "\n".join(lines)


def program_lines() -> Iterator[str | UnicodeDecodeError]:
    """The questions on stdin, one a line, or over several lines as at a terminal; the error of one that is no text."""
    stream = iter(sys.stdin.buffer)

    def read(_: str) -> str:
        raw = next(stream, None)
        if raw is None:
            raise EOFError
        return str(raw, "utf-8-sig").rstrip("\r\n")

    while True:
        try:
            yield _joined(read, "")
        except UnicodeDecodeError as err:
            yield err
        except EOFError:
            return
