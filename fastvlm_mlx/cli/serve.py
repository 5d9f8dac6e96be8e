"""`fastvlm serve`: answers other programs over HTTP, and people on a page."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.background import start
from fastvlm_mlx.cli.options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    Detail,
    LoadDType,
    Resolution,
    Revision,
    complete_model,
    refuse,
    user_path,
    with_detail,
)
from fastvlm_mlx.cli.terminal import ByteProgress, note, show, warn_of_slow_blas
from fastvlm_mlx.cli.usage import is_given, usage_errors

if TYPE_CHECKING:
    from fastvlm_mlx.generation.engine import Engine

KEY_VARIABLE = "FASTVLM_API_KEY"
_PASSED_ON = ("PATH", "HOME", "HF_HOME", "HF_HUB_OFFLINE", "FASTVLM_CACHE")


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", envvar="FASTVLM_MODEL", help=MODEL_HELP, autocompletion=complete_model),
    ] = DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(metavar="NAME", help="Address to listen on; others than this machine's own loopback need a key."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    unix_socket: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Listen on a socket file that only you can open."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help=f"Keys of which each request must have one, a key on each line; {KEY_VARIABLE} may have more.",
        ),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen on any --host without a key.")] = False,
    allow_image_urls: Annotated[
        bool,
        typer.Option("--allow-image-urls", help="Fetch images from the public internet when a request names them."),
    ] = False,
    media_root: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=user_path, help="Let requests name images below this folder by path."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A web page that may use the server, such as http://localhost:3000; may be repeated; '*' allows all.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that the Host header may have beside --host; may be repeated."),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name for the model; may be repeated.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temp", "-t", metavar="N", min=0.0, help="Sampling temperature where a request has none.")
    ] = 0.0,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-n", metavar="N", min=1, help="Longest answer, and that of a request without a limit."
        ),
    ] = 2048,
    max_body: Annotated[int, typer.Option(metavar="MB", min=1, max=1000, help="Largest request.")] = 32,
    max_pixels: Annotated[
        int, typer.Option(metavar="MP", min=1, max=1000, help="Largest image, in million pixels.")
    ] = 100,
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Most images of a request.")] = 16,
    max_resolution: Annotated[
        int, typer.Option(metavar="N", min=64, max=4096, help="Largest resolution that a request may ask for.")
    ] = 1536,
    max_queue: Annotated[int, typer.Option(metavar="N", min=0, help="Most requests that wait; others get 429.")] = 64,
    max_queue_body: Annotated[
        int, typer.Option(metavar="MB", min=1, help="Most megabytes of all requests that wait or are answered.")
    ] = 256,
    queue_seconds: Annotated[float, typer.Option(metavar="N", min=0.1, help="Longest wait for a first token.")] = 120.0,
    answer_seconds: Annotated[float, typer.Option(metavar="N", min=0.1, help="After which an answer is cut.")] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(metavar="N", min=0.0, help="For answers on their way when the server is told to stop.")
    ] = 30.0,
    max_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests at a time. [default: what suits the machine]")
    ] = None,
    album: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=user_path, help="Let people search the pictures of a folder."),
    ] = None,
    resolution: Resolution = None,
    detail: Detail = None,
    dtype: LoadDType = None,
    revision: Revision = None,
    warmup: Annotated[
        bool, typer.Option("--warmup/--no-warmup", help="Answer a question before the first request comes.")
    ] = True,
    background: Annotated[
        bool,
        typer.Option("--background", help="Keep the model warm for `fastvlm generate`, `chat` and `caption`."),
    ] = False,
    idle: Annotated[
        float,
        typer.Option(metavar="MINUTES", min=0.0, help="With --background, end after so long without a question."),
    ] = 30.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tokens and seconds of each answer on stderr.")
    ] = False,
    print_launchd: Annotated[
        bool, typer.Option("--print-launchd", help="Print the property list for macOS's launchd, and stop.")
    ] = False,
) -> None:
    """Answer other programs over HTTP, and people on a page in the browser.

    The server speaks OpenAI's API at /v1. It listens on this machine only, reads images only from requests themselves,
    and takes no more than it can answer; options open what is closed. A request without a temperature gets the most
    likely answer, unlike OpenAI's, where it would be 1. SIGTERM and Ctrl-C let answers end; a second one does not.
    """
    if background:
        _refuse_with_background(context)
        start(model, revision=revision, dtype=dtype.value if dtype else None, max_batch=max_batch, idle=idle)
        return
    refuse({"--idle": is_given(context, "idle")}, "without --background")

    from fastvlm_mlx.server.access import read_keys
    from fastvlm_mlx.server.settings import Settings

    if unix_socket is not None:
        given = [f"--{name.replace('_', '-')}" for name in ("host", "port", "no_auth") if is_given(context, name)]
        refuse(given, "with --unix-socket")
    with usage_errors():
        settings = Settings(
            host=host,
            port=port,
            unix_socket=unix_socket,
            api_keys=read_keys(api_key_file, os.environ.get(KEY_VARIABLE, "")),
            no_auth=no_auth,
            allowed_hosts=tuple(allow_host or ()),
            allow_origins=tuple(allow_origin or ()),
            allow_image_urls=allow_image_urls,
            media_root=media_root,
            max_body_bytes=max_body * 1_000_000,
            max_pixels=max_pixels * 1_000_000,
            max_images=max_images,
            max_resolution=max_resolution,
            max_tokens=max_tokens,
            max_queue=max_queue,
            max_queue_bytes=max_queue_body * 1_000_000,
            queue_seconds=queue_seconds,
            answer_seconds=answer_seconds,
            drain_seconds=drain_seconds,
            resolution=with_detail(resolution, detail),
            temperature=temperature,
        )
    if print_launchd:
        _print_launchd(has_key_file=api_key_file is not None)
        return
    from fastvlm_mlx.resolve import check_names

    check_names([(model, revision)])

    from fastvlm_mlx.server.album import ServedAlbum
    from fastvlm_mlx.server.app import make_app
    from fastvlm_mlx.server.loading import load_engine, names_of
    from fastvlm_mlx.server.run import serve as run
    from fastvlm_mlx.server.service import Service

    name, aliases = names_of(model)
    served = ServedAlbum(album) if album is not None else None
    service = Service(name, settings, aliases=(*aliases, *(alias or ())), album=served)

    def load() -> "Engine":
        warn_of_slow_blas()
        with ByteProgress() as progress:
            return load_engine(
                service,
                settings,
                model,
                revision=revision,
                dtype=dtype.value if dtype else None,
                max_batch=max_batch or "auto",
                warmup=warmup,
                notify=note,
                progress=progress,
            )

    _log_to_stderr(verbose)
    run(make_app(service, settings), service, settings, load, notify=note)


def _refuse_with_background(context: typer.Context) -> None:
    """Refuses options for what listens on the network, or is open to programs that send requests."""
    used = ("model", "revision", "dtype", "max_batch", "idle", "background")
    parameters = {str(each.name): each.opts[0] for each in context.command.params}
    given = [option for name, option in parameters.items() if name not in used and is_given(context, name)]
    refuse(given, "with --background")


def _log_to_stderr(verbose: bool) -> None:
    """Shows the server's warnings as notes; every answer, too, if it is to be `verbose`."""
    import logging
    import traceback

    class Notes(logging.Handler):
        """Writes each record as one line, and what is a bug with the place where it happened."""

        def emit(self, record: logging.LogRecord) -> None:
            """Writes a record."""
            note(record.getMessage())
            if record.exc_info and record.exc_info[0]:
                for line in "".join(traceback.format_exception(*record.exc_info)).splitlines():
                    note(line)

    handler = Notes()
    for name, level in (("fastvlm_mlx.server", logging.INFO if verbose else logging.WARNING), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _print_launchd(has_key_file: bool) -> None:
    """Prints the property list that starts the server with the present options; it holds no key."""
    from fastvlm_mlx.server.launchd import LABEL, property_list

    arguments = sys.argv[sys.argv.index("serve") :]
    arguments = [argument for argument in arguments if argument != "--print-launchd"]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    log = os.path.expanduser(f"~/Library/Logs/{LABEL}.log")
    command = [sys.executable, "-m", "fastvlm_mlx", *arguments]
    show(property_list(command, environment, folder=os.getcwd(), log=log).rstrip())
    if os.environ.get(KEY_VARIABLE) and not has_key_file:
        note(f"{KEY_VARIABLE} is not in it, as others may read the file; give the key with --api-key-file")
    note(f"save it as ~/Library/LaunchAgents/{LABEL}.plist, then: launchctl load ~/Library/LaunchAgents/{LABEL}.plist")
