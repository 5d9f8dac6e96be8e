"""The Typer application: its commands, and the process that they run in."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, cast

import typer

from fastvlm_mlx import __version__, kernels
from fastvlm_mlx.cli.commands import HELP, Commands
from fastvlm_mlx.cli.terminal import complain
from fastvlm_mlx.cli.usage import Program
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.machine import cache_folder, open_missing_streams, tune_allocator

DEBUG_VARIABLE = "FASTVLM_DEBUG"


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports an unexpected error in one line and names the variable that shows the traceback."""
    complain(f"{kind.__name__}: {error} (unexpected; {DEBUG_VARIABLE}=1 shows where)")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm-mlx {__version__}")
        raise typer.Exit


class _FastVLM(Program):
    """The program with its commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(Any, Commands())

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, without importing the commands."""
        return list(HELP)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the table of the commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(HELP.items()))


# Plain help instead of Rich's panels: they cost 0.17 s of a 0.13 s start.
app = typer.Typer(
    name="fastvlm",
    cls=_FastVLM,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def fastvlm(
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Apple's FastVLM vision-language models on MLX: ask about images, convert and inspect checkpoints."""
    if not debug:
        sys.excepthook = _report_bug


def _exit(number: int, _: FrameType | None) -> None:
    """Ends like an interrupt does, so that nothing half-written stays behind."""
    raise SystemExit(128 + number)


def _kernel_folders() -> Iterator[Path]:
    """Where MLX's kernels can go if not where MLX keeps them."""
    yield Path("/tmp")
    with suppress(CheckpointError):
        yield cache_folder()


def prepare_process() -> None:
    """Sets up streams, signals and memory; for a process that does nothing else than run this program."""
    open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that the terminal's encoding lacks
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _exit)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tune_allocator()
    kernels.move_to_own_folder(_kernel_folders())


def main() -> None:
    """Runs the command line; the entry point of `fastvlm` and `fastvlm-mlx`."""
    prepare_process()
    app()
