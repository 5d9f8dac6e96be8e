"""Writes to the terminal, for all commands. Everything here goes to stderr: stdout is for the answer."""

import shutil
import sys
from typing import TYPE_CHECKING

import typer

from fastvlm_mlx.formatting import readable_bytes

if TYPE_CHECKING:
    from rich.progress import Progress


def note(message: str) -> None:
    """Writes a line for the reader, not for the pipe."""
    typer.echo(message, err=True)


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
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
