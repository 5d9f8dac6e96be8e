"""A server of the demo model in this process."""

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fastvlm_mlx
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.resolve import load
from fastvlm_mlx.server.album import ServedAlbum
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from tests.server.client import Client

SAMPLES = Path(fastvlm_mlx.__file__).parent / "demo_model"


def data_url(name: str = "sample-1.png") -> str:
    """A picture of the demo model as a data: URL."""
    return "data:image/png;base64," + base64.b64encode((SAMPLES / name).read_bytes()).decode()


@pytest.fixture(scope="session")
def demo():
    """The demo model in float32, loaded once."""
    return load("demo", dtype="float32")


@pytest.fixture(scope="session")
def serving(demo) -> Callable[..., object]:
    """`with serving(max_queue=1, max_batch=1) as (client, service)`: an app with an engine of its own."""

    @contextmanager
    def serve(
        max_batch: int = 4,
        model: object = demo,
        album: ServedAlbum | None = None,
        step_seconds: float = 0.0,
        **options: object,
    ) -> Iterator[tuple[Client, Service]]:
        settings = Settings(**options)
        service = Service("demo", settings, aliases=("fastvlm-demo",), album=album)
        with Engine(*model, max_batch=max_batch, queue_size=settings.max_queue + settings.max_choices) as engine:
            if step_seconds:
                slow_down(engine, step_seconds)
            service.start(engine)
            try:
                yield Client(make_app(service, settings)), service
            finally:
                service.stop()
                if album is not None:
                    album.close()

    return serve


SLOW = 0.03
"""Seconds of a step with which 1900 tokens take a minute: such an answer outlasts whatever holds a test up."""


def slow_down(engine: Engine, seconds: float = SLOW) -> list[int]:
    """Makes each step of an engine take `seconds` longer; the list grows with each step."""
    steps: list[int] = []
    step = engine._worker._step

    def step_later() -> None:
        time.sleep(seconds)
        steps.append(1)
        step()

    engine._worker._step = step_later
    return steps


def hold_after(engine: Engine, count: int) -> threading.Event:
    """Lets an engine take so many steps; it goes on when the event is set."""
    go_on = threading.Event()
    step, taken = engine._worker._step, []

    def step_when_free() -> None:
        if len(taken) < count or go_on.wait(60):
            taken.append(1)
            step()

    engine._worker._step = step_when_free
    return go_on


def run(coroutine):
    """Runs a coroutine to its end."""
    return asyncio.run(coroutine)
