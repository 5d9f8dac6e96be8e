"""The Typer application: its commands, and how each of them ends.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 a check failed or some of many items did,
130 interrupted, 128 and the signal's number if ended by SIGTERM or SIGHUP.
"""

import io
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastvlm_mlx import __version__
from fastvlm_mlx.cli import bench, convert, doctor, evaluate, generate, info, quantize, verify
from fastvlm_mlx.cli.options import CHECK_FAILED
from fastvlm_mlx.errors import FastVLMError, GateError
from fastvlm_mlx.machine import tune_allocator

DEBUG_VARIABLE = "FASTVLM_DEBUG"


class _Group(TyperGroup):
    """Turns the errors that users can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # Typer ends quietly when the reader of a pipe has gone
        except (FastVLMError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(CHECK_FAILED if isinstance(error, GateError) else 1) from error


def _one_line(error: Exception) -> str:
    """The error's message; an operating system's as `No space left on device: weights.safetensors`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error)


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Reports an unexpected error in one line and names the variable that shows the traceback."""
    typer.echo(f"error: {kind.__name__}: {error} (unexpected; {DEBUG_VARIABLE}=1 shows where)", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvlm-mlx {__version__}")
        raise typer.Exit


# Plain help instead of Rich's panels: they cost 0.17 s of a 0.13 s start.
app = typer.Typer(
    name="fastvlm",
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
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


app.command()(generate.generate)
app.command()(convert.convert)
app.command()(quantize.quantize)
app.command()(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command()(info.info)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _exit(number: int, _: FrameType | None) -> None:
    """Ends like an interrupt does, so that nothing half-written stays behind."""
    raise SystemExit(128 + number)


def main() -> None:
    """Runs the command line; the entry point of `fastvlm` and `fastvlm-mlx`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that the terminal's encoding lacks
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _exit)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tune_allocator()
    app()
