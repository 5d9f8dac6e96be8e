"""Writes to the terminal, for all commands. Everything here goes to stderr: stdout is for the answer."""

import shutil
import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def note(message: str) -> None:
    """Writes a line for the reader, not for the pipe."""
    typer.echo(message, err=True)


class ByteProgress:
    """A progress bar by bytes on stderr, drawn from the first call on; where stderr is no terminal, nothing.

    Rich is imported with the first call, so that a command that turns out to have nothing to wait for does not pay.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Shows that `done` of `total` bytes are through, and what is being done to them."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=what)


class LiveLine:
    """One line on stderr that is written over and gone at the end; where stderr is no terminal, nothing."""

    def __enter__(self) -> "LiveLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """Shows `text` in place of what was shown before."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            typer.echo(f"\r\x1b[K{text[:width]}", err=True, nl=False)
