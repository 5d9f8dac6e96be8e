"""Background servers for tests: started as users start them, each in a cache folder of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fastvlm_mlx
from fastvlm_mlx.warm.place import Place

COMMAND = [sys.executable, "-m", "fastvlm_mlx"]
PATIENT = Path(__file__).parent / "patient"
"""Has commands wait for a background server that is held up."""
DEMO = Path(fastvlm_mlx.__file__).parent / "demo_model"


def environment(cache: Path, **more: str) -> dict[str, str]:
    """The environment of a command that uses a cache folder, without the variables of whoever runs the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FASTVLM_")}
    return {**own, "FASTVLM_CACHE": str(cache), "PYTHONPATH": str(PATIENT), **more}


def fastvlm(
    cache: Path, *arguments: str, stdin: bytes = b"", folder: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, check=False, env=environment(cache), cwd=folder
    )


def place_in(cache: Path) -> Place:
    return Place(cache / "warm")


@contextmanager
def background(cache: Path, model: str, *options: str) -> Iterator[int]:
    """A server that keeps a model warm for the length of a block; its process."""
    done = fastvlm(cache, "serve", model, "--background", *options)
    assert done.returncode == 0, done.stderr.decode()
    place = place_in(cache)
    holder = place.holder()
    assert holder
    try:
        yield holder
    finally:
        if place.holder() == holder:
            os.kill(holder, signal.SIGKILL)
            until(lambda: place.holder() is None)


def until(condition: object, seconds: float = 60.0) -> None:
    """Waits until something is so."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
