"""Writes to the terminal, for all commands: the result to stdout, everything else to stderr.

What is written for a reader may hold names from checkpoints, servers and arguments. They are made printable here.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import typer

from fastvlm_mlx.formatting import MESSAGE_LENGTH, printable, readable_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

_CONTROLS = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
_PATIENCE = 0.5
"""Seconds of silence before a wait shows."""


def note(message: str) -> None:
    """Writes one line for the reader, not for the pipe; a stderr that cannot be written to is no error."""
    for line in _LIVE:
        line.hide()
    try:
        typer.echo(printable(message, MESSAGE_LENGTH), err=True)
    except OSError:
        _to_null(2)


def complain(message: str) -> None:
    """Writes the one line that an error is."""
    note(f"error: {message}")


def show(text: str, *, err: bool = False) -> None:
    """Writes a result to stdout, for people, or to stderr: what could move a terminal's cursor is escaped."""
    text = "\n".join(printable(line, len(line) * 10) for line in text.split("\n"))
    if err:
        typer.echo(text, err=True)
    else:
        _write_result(f"{text}\n")


def show_answer(text: str) -> None:
    """Writes a piece of an answer to stdout: as it is, but what could move a terminal's cursor is escaped there."""
    if sys.stdout.isatty():
        text = "".join(printable(char) if char in _CONTROLS else char for char in text)
    _write_result(text)


def show_json(record: Any) -> None:
    """Writes a JSON object to stdout, in ASCII where stdout is not UTF-8."""
    import json

    utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    _write_result(f"{json.dumps(record, ensure_ascii=not utf8)}\n")


def _write_result(text: str) -> None:
    """Writes to stdout; the error of one that cannot be written to names it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        raise OSError(err.errno, err.strerror, "stdout") from err


def slow_blas() -> str:
    """What to do about the slow BLAS of MLX's wheel; empty where MLX computes with another."""
    from fastvlm_mlx.backend import blas, device

    return blas().hint if device() == "cpu" else ""


def slow_note(hint: str) -> str:
    """The note that MLX computes with its slow BLAS."""
    return f"slow: MLX computes with its own BLAS, about 20 times slower than OpenBLAS; {hint}"


def warn_of_slow_blas() -> None:
    """Notes that MLX computes with the slow BLAS of its wheel, where it does."""
    if hint := slow_blas():
        note(slow_note(hint))


def silence() -> None:
    """Sends everything that is written from now on to nowhere."""
    _to_null(1)
    _to_null(2)


def drop_stdout() -> None:
    """Sends what waits to be written to stdout, and could not be written, to nowhere."""
    _to_null(1)


def _to_null(descriptor: int) -> None:
    """Sends what is written to a descriptor from now on, and what waits for it, to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be written over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class LiveLine:
    """One line on stderr that is written over and gone at the end; where stderr is no terminal, nothing.

    What takes longer than a second shows its seconds, so that a wait never looks like a standstill.
    """

    def __init__(self) -> None:
        self._text = ""
        self._since = 0.0
        self._drawn = False
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "LiveLine":
        if is_terminal():
            _LIVE.append(self)
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.clear()
        if self in _LIVE:
            _LIVE.remove(self)

    def show(self, text: str) -> None:
        """Shows `text` at once, in place of what was shown before."""
        self.wait_for(text)
        self._draw()

    def wait_for(self, text: str) -> None:
        """Shows `text` in place of what was shown before, if it lasts half a second or more."""
        self.clear()
        with self._lock:
            self._text, self._since = text, time.monotonic()

    def clear(self) -> None:
        """Removes the line until there is something new to show."""
        with self._lock:
            self._text = ""
        self.hide()

    def hide(self) -> None:
        """Removes the line until it is drawn again."""
        with self._lock:
            if self._drawn:
                _write("\r\x1b[K")
            self._drawn = False

    def _tick(self) -> None:
        while not self._ended.wait(_PATIENCE):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if not self._text or self._ended.is_set() or not is_terminal():
                return
            seconds = int(time.monotonic() - self._since)
            text = printable(f"{self._text}, {seconds} s" if seconds else self._text, MESSAGE_LENGTH)
            _write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            self._drawn = True


_LIVE: list[LiveLine] = []
"""The live lines that a note has to clear before it is written."""


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal has gone
        sys.stderr.write(text)
        sys.stderr.flush()


class ByteProgress:
    """A progress bar by bytes or layers on stderr, drawn from the first call on; where it is no terminal, nothing.

    Rich is imported with the first call, so that a command that turns out to have nothing to wait for does not pay.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._total = 0

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Shows that `done` of `total` bytes or layers are through, and what is being done to them."""
        if not is_terminal():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            for line in _LIVE:
                line.clear()
            texts = TextColumn("{task.description}"), TextColumn("{task.fields[amount]}")
            columns = (texts[0], BarColumn(), texts[1], TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, amount="")
            self._bar.start()
        from fastvlm_mlx.convert.progress import Layers

        if total != self._total:  # another unit or another file: the time left is estimated anew
            self._bar.reset(self._task, total=total)
            self._total = total
        if isinstance(total, Layers):
            amount = f"{done}/{total} layers"
        else:
            amount = f"{readable_bytes(done)} of {readable_bytes(total)}"
        self._bar.update(self._task, completed=done, description=what, amount=amount)
