"""The streams that MLX's work is submitted to, and the turns that threads take at them.

MLX binds an ordinary stream to the thread that made it: what one thread has built, another cannot evaluate. The streams
here are of the kind that every thread may use, one thread at a time. So whatever builds a graph, submits it or reads
weights does that within a `turn()`; only waiting for a result needs none. A CPU stream is a thread of the operating
system that never ends, so all models share the streams made here.
"""

import atexit
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.errors import FastVLMError

_EXIT_PATIENCE = 10.0
"""Seconds that the end of the process waits for threads that are inside MLX."""


class Turn:
    """A lock that its holder may take again; inside it, MLX's default stream is the one that all threads share."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._stream: Any = None
        self._process: int | None = None

    @property
    def is_inherited(self) -> bool:
        """Whether MLX was used before this process was forked from the one that used it."""
        return self._process is not None and self._process != os.getpid()

    def __enter__(self) -> bool:
        """Whether this is the outermost turn of the thread.

        Raises:
            FastVLMError: In a forked process; see `check_process`.
        """
        check_process()
        self._lock.acquire()
        self._process = os.getpid()
        try:
            if self._depth == 0:
                _clear_streams_at_thread_end()
                self._stream = mx.stream(_main_stream(device()))
                self._stream.__enter__()
            self._depth += 1
        except BaseException:
            self._lock.release()
            raise
        return self._depth == 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._stream.__exit__(kind, error, trace)
        finally:
            self._lock.release()

    def close(self, patience: float) -> None:
        """Takes the last turn, waiting `patience` seconds for it at most."""
        self._lock.acquire(timeout=patience)


_TURN = Turn()


def turn() -> Turn:
    """The right to build and submit graphs, held by one thread at a time.

    Never hold it across a `yield`, and keep what it protects short: the other threads wait.
    """
    return _TURN


def check_process() -> None:
    """Checks that MLX can be used in this process; otherwise the first use would wait for ever.

    Raises:
        FastVLMError: If it was forked from one that has used MLX, whose threads it lacks.
    """
    if _TURN.is_inherited:
        raise FastVLMError(
            "this process was forked from one that has used a model, and MLX does not work in such a process; load "
            "models only after forking, or start processes afresh: multiprocessing.get_context('spawn')"
        )


_MADE: list[mx.Stream] = []
"""All streams that were made here."""


def _new_stream(kind: str) -> mx.Stream:
    _MADE.append(mx.new_thread_unsafe_stream(mx.gpu if kind == "gpu" else mx.cpu))
    return _MADE[-1]


@functools.cache
def _main_stream(kind: str) -> mx.Stream:
    return _new_stream(kind)


_WORKERS: list[mx.Stream] = []


def worker_streams(count: int) -> list[mx.Stream]:
    """`count` CPU streams that work is divided among, always the same ones; for use within a turn."""
    while len(_WORKERS) < count:
        _WORKERS.append(_new_stream("cpu"))
    return _WORKERS[:count]


_FREE: list[mx.Stream] = []
"""Streams of `own_stream` that no thread uses now."""


@contextmanager
def own_stream() -> Iterator[None]:
    """Lends this thread a stream of its own, for long work that other threads need not wait for.

    The first operation of a thread would make a stream otherwise, and that is never freed, not even by
    `mx.clear_streams` (MLX 0.32). Can be used as a decorator.

    Raises:
        FastVLMError: In a forked process; see `check_process`.
    """
    with turn():
        stream = _FREE.pop() if _FREE else _new_stream(device())
    try:
        with mx.stream(stream):
            yield
    finally:
        _FREE.append(stream)


def free_unused_memory() -> None:
    """Gives back the memory that MLX keeps for the next arrays of a GPU.

    For a CPU it keeps 32 MB at most, and there `mx.clear_cache` would start a native thread for every thread that calls
    it, never to end (MLX 0.32).
    """
    if device() == "gpu":
        with turn():
            mx.clear_cache()


def load_stream() -> mx.Stream:
    """The stream that reads files when their tensors are first used; for use within a turn."""
    return _main_stream("cpu" if mx.metal.is_available() else device())


class _Readers:
    """Counts the threads that wait for values."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1


_READERS = _Readers()


def read(array: mx.array) -> NDArray[Any]:
    """Waits for an array that was submitted and returns its values; other threads may take turns in that time."""
    with _READERS:
        return np.asarray(array)


@atexit.register
def _wait_for_other_threads() -> None:
    """Lets daemon threads finish what they do inside MLX, and begin nothing more.

    A thread that returns from MLX after the interpreter has ended aborts the process.
    """
    if _TURN.is_inherited:
        return
    deadline = time.monotonic() + _EXIT_PATIENCE
    _TURN.close(_EXIT_PATIENCE)
    while _READERS.count and time.monotonic() < deadline:
        time.sleep(0.001)
    _finish_submitted()


def _finish_submitted() -> None:
    """Waits for what was submitted to CPU streams and never read, such as the token behind the last one.

    OpenBLAS joins its threads when the process ends. One that computes at that moment forgets that it should end, and
    is waited for without end (OpenBLAS 0.3.21: `blas_thread_shutdown_` and `blas_thread_server`).
    """
    for stream in _MADE:
        if stream.device == mx.cpu:
            with suppress(RuntimeError):  # what was submitted has failed
                mx.synchronize(stream)


class _ThreadEnd:
    """Frees what MLX keeps for a thread when the thread's local variables go.

    MLX would do so as the very last act of the thread, when Python before 3.13 no longer waits for it; a process that
    ends at that moment aborts ("terminate called without an active exception").
    """

    def __del__(self) -> None:
        if not _TURN.is_inherited:
            mx.clear_streams()


_LOCAL = threading.local()


def _clear_streams_at_thread_end() -> None:
    if hasattr(_LOCAL, "end") or threading.current_thread() is threading.main_thread():
        return
    # In the thread that used MLX first, clearing would end the GPU's shared streams, too.
    if device() == "cpu" or threading.get_ident() != _first_thread():
        _LOCAL.end = _ThreadEnd()


@functools.cache
def _first_thread() -> int:
    mx.default_stream(mx.cpu)
    return threading.get_ident()
