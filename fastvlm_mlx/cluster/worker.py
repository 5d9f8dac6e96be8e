"""A worker: a process on some machine of the cluster that holds a model, and answers questions about pictures."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvlm_mlx.cluster.identity import Identity, Model, check, identity
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.machine import THREADS_VARIABLE

if TYPE_CHECKING:
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.generation.request import Handle, Request

_MEMORY = 32 << 20
"""Bytes for the keys and values of the questions; a picture that is done is not asked about again."""


class Place(NamedTuple):
    """A file that a worker may see, too, under the same path.

    Attributes:
        name: Of the file, as the user wrote it.
        path: The whole one.
        size: In bytes.
        changed: When it was changed, in seconds.
    """

    name: str
    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, name: str) -> Place | None:
        """The place of a file; None if it is no file here."""
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            return None
        return cls(name, os.path.abspath(name), status.st_size, int(status.st_mtime))

    def read(self) -> Encoded | None:
        """The bytes of the file; None if this machine does not see it.

        Raises:
            ImageError: If it cannot be read.
        """
        found = self.of(self.path)
        if found is None or found[2:] != self[2:]:
            return None
        return Encoded(read(self.path).data, printable(self.name))


class Asked(NamedTuple):
    """A request, and where its picture is if it does not hold that."""

    request: Request
    place: Place | None


class Outcome(NamedTuple):
    """What came of a question: an answer, the error of its picture, or a reason to ask it in another way.

    Attributes:
        result: The answer.
        error: Why the picture has none.
        absent: Whether the machine does not see the file, and needs its bytes.
        refused: Why the machine may not answer at all.
    """

    result: Any = None
    error: BaseException | None = None
    absent: bool = False
    refused: FastVLMError | None = None


class Worker:
    """Answers from one model; several threads may ask at the same time. Ray makes an actor of it.

    A call holds several requests, since Ray takes a millisecond or two of each process for a call.

    Args:
        model: What it loads, with the first question or `ready`.
        expected: The identity that this machine has to have.
        threads: Cores that it may use on a CPU.
        max_batch: The most questions at a time; None for what suits the machine.
    """

    def __init__(self, model: Model, expected: Identity, *, threads: int, max_batch: int | None = None) -> None:
        limit_threads(threads)
        self._model, self._expected, self._max_batch = model, expected, max_batch
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._refused: FastVLMError | None = None

    def ready(self) -> int | FastVLMError:
        """How many questions it answers at a time, after loading the model; or why it may not."""
        engine = self._loaded()
        return engine if isinstance(engine, FastVLMError) else int(engine.max_batch)

    def pid(self) -> int:
        """The number of its process."""
        return os.getpid()

    def answer(self, asked: Sequence[Asked]) -> list[Outcome]:
        """Answers requests about the pictures that they have, or about files; waits for all of them."""
        engine = self._loaded()
        if isinstance(engine, FastVLMError):
            return [Outcome(refused=engine)] * len(asked)
        handles = [self._submit(engine, *each) for each in asked]
        return [Outcome(absent=True) if handle is None else _outcome(handle) for handle in handles]

    def _submit(self, engine: Engine, request: Request, place: Place | None) -> Handle | None:
        """Asks the engine; None if its picture is a file that this machine does not see."""
        if place is not None:
            try:
                encoded = place.read()
            except FastVLMError:  # it may be one that only this machine may not read
                encoded = None
            if encoded is None:
                return None
            images: list[Any] = [encoded]
            request = replace(request, image=images)
        return engine.submit(request)

    def _loaded(self) -> Engine | FastVLMError:
        with self._lock:
            if self._engine is None and self._refused is None:
                try:
                    self._engine = load_engine(self._model, self._expected, self._max_batch)
                except FastVLMError as err:
                    self._refused = err
            loaded = self._engine or self._refused
        assert loaded is not None
        return loaded


def _outcome(handle: Handle) -> Outcome:
    """What came of a question, after waiting for it."""
    try:
        return Outcome(result=handle.result())
    except (FastVLMError, MemoryError) as err:
        return Outcome(error=err)


def limit_threads(threads: int) -> None:
    """Lets this process compute with so many cores; before it imports MLX."""
    count = str(threads)
    os.environ |= {THREADS_VARIABLE: count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}


def load_engine(model: Model, expected: Identity, max_batch: int | None = None) -> Engine:
    """An engine with the model, after comparing this machine with the one that gives the work.

    Raises:
        ConfigError: If this machine would answer in another way.
        CheckpointError: If the model cannot be loaded.
    """
    from fastvlm_mlx.engine.prefix_cache import PrefixCache
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    check(expected, identity(model), f"worker on {host()}")
    network, processor = load(model.name, revision=model.revision, dtype=model.dtype)
    return Engine(network, processor, max_batch=max_batch or "auto", prefix_cache=PrefixCache(_MEMORY))


def host() -> str:
    """The name of this machine, for messages."""
    import socket

    return socket.gethostname()
