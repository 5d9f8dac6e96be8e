"""The commands by name; each is imported when it is called, so that a start costs no more than what it runs."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
import typer.main

from fastvlm_mlx.cli.usage import Command

HELP = {
    "generate": "Answer a question about images.",
    "chat": "Talk about pictures.",
    "caption": "Caption whole folders.",
    "search": "Find the pictures of a folder that show something.",
    "merge": "Make one file of the captions of many machines.",
    "watch": "Say what a camera, a screen or a film shows.",
    "serve": "Answer other programs over HTTP, and people on a page.",
    "status": "Say whether a background server keeps a model warm.",
    "stop": "End the background server.",
    "convert": "Convert a checkpoint to MLX.",
    "quantize": "Quantize a checkpoint and report what that cost.",
    "verify": "Compare a checkpoint with its source.",
    "eval": "Score a model's answers to the questions in a file.",
    "info": "Show this machine, or a checkpoint.",
    "doctor": "Check this machine and a model.",
    "bench": "Measure the time to first token.",
    "cache": "Show what the cache folder holds, or remove from it.",
}
"""What each command does, as the list of commands says it."""

_MODULES = {"eval": "evaluate"}
"""The files whose commands have other names."""


class Commands(Mapping[str, Any]):
    """The commands of `HELP`: of each file its function of the same name, or its Typer application."""

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name in HELP and name not in self._imported:
            self._imported[name] = _command(name)
        return self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(HELP)

    def __len__(self) -> int:
        return len(HELP)


def _command(name: str) -> Any:
    file = _MODULES.get(name, name)
    module = import_module(f"fastvlm_mlx.cli.{file}")
    if hasattr(module, "app"):
        command: Any = typer.main.get_group(module.app)
    else:
        alone = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
        alone.command(cls=Command)(getattr(module, file))
        command = typer.main.get_command(alone)
    command.name = name
    return command
