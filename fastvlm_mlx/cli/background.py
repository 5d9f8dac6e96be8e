"""The background server: starts it from the command line, runs it in a process of its own, and ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, complain, note
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.machine import CACHE_VARIABLE

if TYPE_CHECKING:
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.warm.place import Place

_CODE = "import sys; sys.path[:] = {path!r}; from fastvlm_mlx.cli.background import run; sys.exit(run({options!r}))"
_TAKEN = 75
"""Exit code of a server that ends at once because another one holds the lock."""
_DRAIN_SECONDS = 10.0
"""That answers may go on after the server was told to stop."""
_STEP = 0.05
"""Seconds between two looks at what another process does."""
_PATIENCE = 5.0
"""Seconds that a process has to end."""
_LAST_LINE = 2000
"""Bytes at the end of a log that are looked at."""


def start(model: str, *, revision: str | None, dtype: str | None, max_batch: int | None, idle: float) -> None:
    """Starts the background server and waits until it is ready; without effect if it holds the model already.

    Raises:
        FastVLMError: If it cannot be started, or another one runs.
    """
    from fastvlm_mlx.resolve import resolve
    from fastvlm_mlx.warm.client import Holding, find_warm
    from fastvlm_mlx.warm.place import Place

    place, holding = Place.of_user(), Holding(model=model, revision=revision, dtype=dtype)
    if server := find_warm(holding, place):
        note(f"{model} is warm already, in process {server.pid}")
        return
    place.make()
    _check_free(place)
    with ByteProgress() as progress:
        resolve(model, revision=revision, notify=note, progress=progress)
    options = {**holding.record(), "name": model, "max_batch": max_batch, "idle_seconds": 60 * idle}
    process = _spawn(place, options)
    try:
        with LiveLine() as line:
            line.wait_for(f"loading {model}")
            _wait_until_ready(place, process)
    except BaseException:
        process.terminate()
        raise
    ends = f"ends after {idle:g} minutes without a question" if idle else "ends with `fastvlm stop`"
    note(f"{model} is warm: process {process.pid}, which {ends}")


def _check_free(place: "Place") -> None:
    """Checks that no other server runs.

    Raises:
        WarmError: If one does.
    """
    from fastvlm_mlx.warm.client import status
    from fastvlm_mlx.warm.place import WarmError

    holder = place.holder()
    if holder is not None:
        said = status(place) or {}
        what = f"keeps {printable(said['model'])} warm" if said.get("state") == "ready" else "is starting"
        raise WarmError(f"a background server {what} already (process {holder}); `fastvlm stop` ends it")


def _spawn(place: "Place", options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """Starts the process of the server, which outlives this one."""
    path = [os.path.abspath(each) for each in sys.path if each]
    environment = {**os.environ, CACHE_VARIABLE: str(place.folder.parent)}
    descriptor = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=path, options=json.dumps(options))],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=place.folder,
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _wait_until_ready(place: "Place", process: "subprocess.Popen[bytes]") -> None:
    """Waits until the server can answer.

    Raises:
        WarmError: If it ends before.
    """
    from fastvlm_mlx.warm.client import status
    from fastvlm_mlx.warm.place import WarmError

    while True:
        said = status(place) or {}
        if said.get("pid") == process.pid and said.get("state") == "ready":
            return
        with suppress(subprocess.TimeoutExpired):
            if process.wait(_STEP) == _TAKEN:
                _check_free(place)
                raise WarmError("another background server was started at the same time; try again")
            raise WarmError(f"the background server has ended: {_last_line(place.log)}")


def _last_line(log: Path) -> str:
    """The last line of a log, without the word that errors begin with."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(-min(_LAST_LINE, os.fstat(file.fileno()).st_size), os.SEEK_END)
        lines = file.read().decode("utf-8", "replace").split("\n")
        return next((text.removeprefix("error: ") for text in reversed(lines) if text.strip()), "its log is empty")
    return "it has no log"


def end(place: "Place") -> int | None:
    """Ends the server, by force if it does not react; returns its process, None if none runs.

    Raises:
        WarmError: If it cannot be ended.
    """
    from fastvlm_mlx.warm.client import stop
    from fastvlm_mlx.warm.place import WarmError

    holder = place.holder()
    if holder is None:
        return None
    if not stop(place) and holder:
        _signal(holder, signal.SIGTERM)
    if _is_free(place, _DRAIN_SECONDS + _PATIENCE):
        return holder
    if holder:
        note(f"process {holder} does not react; killing it")
        _signal(holder, signal.SIGKILL)
        if _is_free(place, _PATIENCE):
            return holder
    raise WarmError(f"the background server (process {holder or 'unknown'}) cannot be ended; end it with `kill -9`")


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _is_free(place: "Place", seconds: float) -> bool:
    """Whether no server runs, after waiting for that."""
    deadline = time.monotonic() + seconds
    while place.holder() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP)
    return True


def run(options: str) -> int:
    """Runs the server until it is ended; returns the exit code. For the process that `start` makes."""
    from fastvlm_mlx.cli.app import prepare_process
    from fastvlm_mlx.warm.place import Place

    prepare_process()
    place = Place.of_user()
    try:
        with place.locked() as held:
            if not held:
                return _TAKEN
            os.ftruncate(sys.stderr.fileno(), 0)
            _serve(place, json.loads(options))
    except FastVLMError as error:
        complain(str(error))
        return 1
    return 0


def _serve(place: "Place", options: dict[str, Any]) -> None:
    """Serves on the socket, and removes it at the end."""
    import threading

    from fastvlm_mlx.server.app import make_app
    from fastvlm_mlx.server.loading import load_engine, names_of
    from fastvlm_mlx.server.run import serve
    from fastvlm_mlx.server.service import Service
    from fastvlm_mlx.server.settings import Settings
    from fastvlm_mlx.server.warm import Held, WarmDoor

    settings = Settings(unix_socket=place.socket_file, drain_seconds=_DRAIN_SECONDS)
    name, aliases = names_of(options["name"])
    service = Service(name, settings, aliases=aliases)
    door = WarmDoor(make_app(service, settings), service, _stop, options["idle_seconds"])

    def load() -> "Engine":
        held = Held.of(options)
        engine = load_engine(
            service,
            settings,
            held.folder,
            dtype=options["dtype"],
            max_batch=options["max_batch"] or "auto",
            notify=note,
        )
        door.held = held
        threading.Thread(target=door.watch, name="fastvlm-idle", daemon=True).start()
        return engine

    listener = place.listen()
    try:
        serve(door, service, settings, load, notify=note, sockets=[listener])
    finally:
        with suppress(OSError):
            place.socket_file.unlink()


def _stop() -> None:
    """Ends this process as `kill` does, so that answers on their way may end."""
    os.kill(os.getpid(), signal.SIGTERM)
