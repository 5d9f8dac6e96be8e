"""A real `fastvlm serve demo` for the official client packages; `make test-clients` runs these tests.

The clients are in an environment of their own, without MLX; FASTVLM_PYTHON is the interpreter that the server runs in.
"""

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "fastvlm_mlx/demo_model"
KEY = "key-of-the-tests"


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: Without a path.
        key: The key that it wants.
    """

    url: str
    key: str = KEY


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as anyone would start it."""
    with running(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that answers one question at a time, and lets none wait."""
    with running(tmp_path_factory.mktemp("server") / "log", "--max-batch", "1", "--max-queue", "0") as server:
        yield server


@contextmanager
def running(log: Path, *options: str) -> Iterator[Server]:
    python = os.environ.get("FASTVLM_PYTHON", sys.executable)
    command = [python, "-m", "fastvlm_mlx", "serve", "demo", "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, "FASTVLM_API_KEY": KEY}
        )
    try:
        yield Server(_address(process, log))
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits until the server is ready."""
    deadline = time.monotonic() + 60
    while "ready: " not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    found = re.search(r"http://[^\s]+", log.read_text())
    assert found is not None
    return found.group().rstrip("/")


@pytest.fixture(scope="session")
def image() -> bytes:
    """A green triangle, a black cross and a green cross."""
    return (SAMPLES / "sample-1.png").read_bytes()


@pytest.fixture(scope="session")
def image_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
