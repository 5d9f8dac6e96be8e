"""How commands present themselves and how they end: help in a user's words, and wrong usage in one line.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 a check failed or some of many items did,
130 interrupted, 128 and the signal's number if ended by SIGTERM or SIGHUP.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastvlm_mlx.cli.terminal import complain, drop_stdout
from fastvlm_mlx.cli.values import convert_plainly
from fastvlm_mlx.errors import FastVLMError, GateError
from fastvlm_mlx.formatting import printable

CHECK_FAILED = 3
"""Exit code of a command that did its work and found that a check has failed; 1 is for errors."""

UsageError: Any = typer.BadParameter.__base__
"""What the command line raises for wrong usage: a class of click's or of Typer's own, by Typer's version."""

_REASONS = {
    "greater_than_equal": "must be at least {ge:g}, not {input}",
    "less_than_equal": "must be at most {le:g}, not {input}",
    "int_parsing": "{input!r} is not a whole number",
    "float_parsing": "{input!r} is not a number",
    "bool_parsing": "{input!r} is neither 1 nor 0",
    "value_error": "{error}",
}
"""What is wrong with a value, by the kind of error that newer versions of Typer find."""


class _Help:
    """Help without the names of Python's types: what a value is, is said by its metavar."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the values of the command line."""
        convert_plainly(self.get_params(ctx))  # type: ignore[attr-defined]
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`SOURCE` for a required argument, `[SOURCE]` for another."""
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the tables of arguments and options, and a group's commands."""
        tables: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            if record := param.get_help_record(ctx):
                tables[param.param_type_name].append(record)
        tables["argument"] = [(name.partition(" <")[0], text) for name, text in tables["argument"]]
        for kind, rows in tables.items():
            if rows:
                with formatter.section(f"{kind.capitalize()}s"):
                    formatter.write_dl(rows)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)


class Command(_Help, TyperCommand):
    """A command."""


class CommandGroup(_Help, TyperGroup):
    """A command with commands of its own."""


class Program(CommandGroup):
    """The whole command line: whatever goes wrong in it is one line on stderr and an exit code."""

    debug = False
    """Whether errors show their tracebacks."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs a command and ends the process."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False}) or 0
            sys.stdout.flush()
        except UsageError as error:
            complain(_wrong_usage(error))
            code = 2
        except BrokenPipeError:  # the reader of a pipe has gone
            code = 1
        except typer.Abort:  # the answer to a question was no
            complain("nothing was done")
            code = 1
        except OSError as error:
            if self.debug:
                raise
            complain(f"{error.strerror or error}: stdout")  # of help, as those of commands are dealt with
            code = 1
        try:
            sys.stdout.flush()
        except OSError:  # Python would try it again, and complain
            drop_stdout()
        sys.exit(code)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Shows the help where no command is given, and refuses what no file name or question can hold."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        for text in args:
            try:
                os.fsencode(text)
            except UnicodeEncodeError as err:
                raise typer.BadParameter(f"{printable(text, 60)} is not valid Unicode") from err
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; what a user can cause becomes one line, unless tracebacks are wanted."""
        self.debug = ctx.params["debug"]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (FastVLMError, OSError) as error:
            if self.debug:
                raise
            complain(_one_line(error))
            raise typer.Exit(CHECK_FAILED if isinstance(error, GateError) else 1) from error


@contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """Turns what options are refused for into wrong usage.

    Args:
        option: The option, where the message does not name it.
    """
    try:
        yield
    except FastVLMError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line; an environment variable or a default do not count."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _wrong_usage(error: Any) -> str:
    """The message of a usage error, and where to read more."""
    cause = error.__cause__
    if hasattr(cause, "errors"):  # of pydantic, with which newer versions of Typer parse values
        details = cause.errors()[0]
        reason = _REASONS.get(details["type"], details["msg"])
        error.message = reason.format(input=details["input"], **details.get("ctx", {}))
    message: str = error.format_message().removesuffix(".")
    if not error.ctx:
        return message
    return f"{message}{' See' if message.endswith('?') else '; see'} `{error.ctx.command_path} --help`"


def _one_line(error: Exception) -> str:
    """The error's message; an operating system's as `No space left on device: weights.safetensors`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error)
