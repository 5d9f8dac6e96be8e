"""`fastvlm chat`: a conversation about pictures, at a terminal or with a program."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.chatting import Chat, Watcher, aside
from fastvlm_mlx.cli.options import (
    CHECK_FAILED,
    DEFAULT_MODEL,
    Background,
    Detail,
    Frames,
    LoadDType,
    Model,
    Resolution,
    Revision,
    Warm,
    with_detail,
)
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note, slow_blas
from fastvlm_mlx.cli.usage import usage_errors
from fastvlm_mlx.machine import cache_folder

if TYPE_CHECKING:
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.warm.client import Holding


def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Files or URLs to show first; films, PDFs, @clipboard."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Replaces the system prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 512,
    temperature: Annotated[
        float,
        typer.Option("--temp", "-t", metavar="N", min=0.0, help="Sampling temperature; 0 takes the most likely token."),
    ] = 0.0,
    frames: Frames = None,
    resolution: Resolution = None,
    detail: Detail = None,
    background: Background = None,
    dtype: LoadDType = None,
    go_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Keep neither the conversation nor what is typed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON object for each answer.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Time to the first token, speed and reused tokens on stderr.")
    ] = False,
    warm: Warm = True,
) -> None:
    """Talk about pictures.

    Drop a picture into the line, or name it with /image, and ask. What was seen is kept, so that follow-up questions
    are answered faster; /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal,
    each line is a question, and each answer one line.

    The last conversation is kept in the cache folder after each answer, and --continue goes on with it.
    """
    from fastvlm_mlx.chat.answerers import Best, Here
    from fastvlm_mlx.chat.dialogue import Dialogue
    from fastvlm_mlx.chat.session import Keeper
    from fastvlm_mlx.chat.settings import Settings
    from fastvlm_mlx.engine.options import GenerationConfig
    from fastvlm_mlx.warm.client import Holding

    with usage_errors():
        config = GenerationConfig(max_tokens=max_tokens, temperature=temperature)
    settings = Settings(config=config, resolution=with_detail(resolution, detail), background=background)
    holding = Holding(model=model, revision=revision, dtype=dtype.value if dtype else None)
    folder = cache_folder() / "chat"
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    with ExitStack() as stack:
        here = Here(lambda: stack.enter_context(_load(holding)))
        answerer = Best(holding, here, warm=warm)
        dialogue = Dialogue(answerer, settings, aside)
        watcher = Watcher(lambda: answerer.server.slow if answerer.server else slow_blas())
        keeper = None if private or not (is_terminal or go_on) else Keeper(folder, aside)
        talk = Chat(dialogue, watcher, keeper, model=model, verbose=verbose, as_json=as_json, frames=frames)
        if go_on:
            talk.load(folder / "last.json")
        if system is not None:
            dialogue.set_system(system)
        talk.add(images or [])
        if answerer.server is None:
            here.start()
        elif verbose:
            note(f"server: process {answerer.server.pid}, which keeps the model warm")
        if is_terminal:
            aside("drop a picture here and ask; /help lists commands")
            talk.talk(None if private else _history())
        else:
            talk.serve()
    if talk.failures:
        raise typer.Exit(CHECK_FAILED)


def _load(holding: "Holding") -> "Engine":
    """Loads the model."""
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    with LiveLine() as line, ByteProgress() as progress:
        line.wait_for(f"loading {holding.model}")
        network, processor = load(
            holding.model, dtype=holding.dtype, revision=holding.revision, notify=note, progress=progress
        )
        return Engine(network, processor, max_batch=1)


def _history() -> Path | None:
    """The file of what was typed; None where it cannot be kept."""
    from fastvlm_mlx.chat.session import make_private

    folder = cache_folder() / "chat"
    try:
        make_private(folder)
    except OSError:
        return None
    return folder / "history"
