"""Many requests at once, from any thread: answered together, each as it would be alone."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import Literal

from fastvlm_mlx.arguments import check_callable, check_kind, flag, whole
from fastvlm_mlx.engine.capacity import default_rows, free_positions
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.errors import ConfigError, QueueFullError
from fastvlm_mlx.generation.answer import Answer
from fastvlm_mlx.generation.doors import check_loaded
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.machine import describe
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import free_unused_memory, read
from fastvlm_mlx.structured.grammar import Grammars
from fastvlm_mlx.structured.schemas import Schema

PREPARING_THREADS = 2
"""Threads that read and resize images while the model computes."""

IDLE_SECONDS = 1.0
"""Without work for so long, the engine gives back the memory that is only kept for the next arrays."""


class Engine:
    """Answers many requests at once: one thread computes, and any thread may ask.

        with Engine(model, processor) as engine:
            for handle in engine.map(Request(image=path) for path in paths):
                print(handle.request.image, handle.result().text)

    Requests join and leave while others are answered. Each has its own settings and gets the answer that it would get
    alone. Images are read and resized in other threads meanwhile.

    Args:
        model: From `load`.
        processor: From `load`.
        max_batch: The most requests that are answered at the same time; `auto` takes what suits device and memory.
        queue_size: The most requests that wait behind those; None for twice as many.
        prefix_cache: Keys and values of earlier prompts; None for one of its own.

    Attributes:
        max_batch: As a number.
        model: From `load`.
        processor: From `load`.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: FastVLMProcessor,
        *,
        max_batch: int | Literal["auto"] = "auto",
        queue_size: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        check_loaded(model, processor, prefix_cache)
        if model.group is not None:
            raise ConfigError("a model in several processes has to be asked in one order: use generate, not Engine")
        positions = free_positions(model, describe().memory)
        is_auto = max_batch is None or (isinstance(max_batch, str) and max_batch == "auto")
        self.max_batch = default_rows(positions) if is_auto else whole(max_batch, "max_batch")
        queue_size = 2 * self.max_batch if queue_size is None else whole(queue_size, "queue_size", 0)
        cache = PrefixCache() if prefix_cache is None else prefix_cache
        self.model = model
        self.processor = processor
        self._room = threading.Semaphore(self.max_batch + queue_size)
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="fastvlm-prepare")
        scheduler = Scheduler(model, max_rows=self.max_batch, max_positions=positions, prefix_cache=cache)
        worker = _Worker(scheduler, self._room.release)
        self._worker = worker
        self._close = weakref.finalize(self, worker.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests; False when it is closed, or its thread has failed."""
        return not self._worker.closed

    @property
    def answering(self) -> int:
        """How many requests get their next token in a step; the others wait or are prepared."""
        return self._worker.scheduler.row_count

    @property
    def kv_usage(self) -> float:
        """The part, from 0 to 1, of the memory for keys and values that they take."""
        return self._worker.scheduler.kv_usage

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 without work."""
        return self._worker.step_seconds

    def close(self) -> None:
        """Cancels what is not done, and ends the engine's threads."""
        self._close()
        self._preparing.shutdown()

    def submit(
        self, request: Request, *, wait: bool = True, on_change: Callable[[Handle], None] | None = None
    ) -> Handle:
        """Asks a question.

        Args:
            request: The question.
            wait: Whether to wait for room in the queue.
            on_change: Called with the handle for every new piece, and when it has ended; in another thread.

        Raises:
            QueueFullError: If there is no room and `wait` is False.
            ConfigError: If the engine is closed, or an argument is of the wrong kind.
        """
        start = time.perf_counter()
        check_kind(request, "request", Request, "a Request")
        check_callable(on_change, "on_change")
        wait = flag(wait, "wait")
        if not self._room.acquire(blocking=wait):
            raise QueueFullError("the engine's queue is full; ask again when an answer is done")
        handle = Handle(request, on_change)
        try:
            self._worker.expect(handle)
            self._preparing.submit(_prepare, self.processor, self._worker, handle, start)
        except RuntimeError as err:
            self._worker.end(handle, CancelledError())
            raise ConfigError("the engine is closed") from err
        return handle

    def map(self, requests: Iterable[Request]) -> Iterator[Handle]:
        """The handles of many requests, in their order, each when it is done.

        Requests are taken from the iterable as there is room for them. When the iteration ends early, those on their
        way are cancelled.
        """
        pending: deque[Handle] = deque()
        if not isinstance(requests, Iterable):
            raise ConfigError(f"requests must be an iterable of Request, not {type(requests).__name__}")
        try:
            for request in requests:
                pending.append(self.submit(request))
                while pending and pending[0].done:
                    yield pending.popleft()
            while pending:
                pending[0].wait()
                yield pending.popleft()
        finally:
            for handle in pending:
                handle.cancel()


def _prepare(processor: FastVLMProcessor, worker: _Worker, handle: Handle, start: float) -> None:
    """Turns a request into a row for the worker; ends it if that fails."""
    request, began = handle.request, time.perf_counter()
    try:
        request.config.check_vocabulary(processor.vocab_size)
        schema = Schema.of(request.schema)
        if handle.cancelled:
            worker.end(handle, None)
            return
        inputs = processor.prepare(
            request.image,
            request.prompt,
            resolution=request.resolution,
            system=request.system,
            background=request.background,
            allow=request.allow,
            prefix=request.prefix,
        )
        preprocess = time.perf_counter() - began
        answer = Answer(
            inputs,
            request.config,
            start=start,
            preprocess=preprocess,
            sentence=request.sentence,
            max_words=request.max_words,
            opening=request.opening,
        )
        row = Row(
            inputs.input_ids,
            inputs.pixel_values,
            request.config,
            max_tokens=answer.max_tokens,
            end_tokens=answer.end_tokens,
            constrain=None if schema is None else partial(Grammars.of(processor).start, schema),
            keep_visual_tokens=request.keep_visual_tokens,
        )
        _ = row.key  # hashed here, while another thread computes
        if schema is not None:
            Grammars.of(processor).start(schema)  # built here, for the same reason
    except BaseException as error:
        worker.end(handle, error)
        raise
    worker.add(row, handle, answer)


class _Worker:
    """The thread that computes.

    Args:
        scheduler: Stepped by this thread alone.
        release: Called for every handle that ends.

    Attributes:
        closed: Whether it takes no more rows.
    """

    def __init__(self, scheduler: Scheduler, release: Callable[[], None]) -> None:
        self.scheduler = scheduler
        self._release = release
        self._open: dict[Handle, None] = {}
        self._arrived: list[tuple[Row, Handle, Answer]] = []
        self._rows: dict[Row, tuple[Handle, Answer]] = {}
        self._changed = threading.Condition()
        self.closed = False
        self._thread: threading.Thread | None = None
        self._step_began: float | None = None

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 without one."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def expect(self, handle: Handle) -> None:
        """Notes a handle whose row will be added.

        Raises:
            RuntimeError: If the worker is closed.
        """
        with self._changed:
            if self.closed:
                raise RuntimeError("closed")
            self._open[handle] = None

    def add(self, row: Row, handle: Handle, answer: Answer) -> None:
        """Lets a row join; the first one starts the thread."""
        with self._changed:
            self._arrived.append((row, handle, answer))
            self._changed.notify()
            if self._thread is None and not self.closed:
                self._thread = threading.Thread(target=self._run, name="fastvlm-engine", daemon=True)
                self._thread.start()

    def end(self, handle: Handle, error: BaseException | None) -> None:
        """Ends a handle, once."""
        with self._changed:
            self._open.pop(handle, None)
        if handle.end(error):
            self._release()

    def close(self) -> None:
        """Ends the thread after its step, and all handles."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._end_all(CancelledError())

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            self.closed = True
            handles = list(self._open)
        for handle in handles:
            self.end(handle, error)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._step_began = time.monotonic()
                self._step()
                self._step_began = None
        except BaseException as error:
            self._end_all(error)
            raise

    def _take_in(self) -> bool:
        """Whether there is something to do, after waiting for that; False when the worker is closed."""
        if not self.scheduler.is_busy and not self._wait(IDLE_SECONDS):
            free_unused_memory()
            self._wait(None)
        with self._changed:
            arrived, self._arrived = self._arrived, []
        self._rows.update({row: (handle, answer) for row, handle, answer in arrived})
        self.scheduler.add(row for row, _, _ in arrived)
        return not self.closed

    def _wait(self, timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.closed or bool(self._arrived), timeout)

    def _step(self) -> None:
        for row in [row for row, (handle, _) in self._rows.items() if handle.cancelled]:
            self._end_row(row)
        for row in self.scheduler.step():
            if row not in self._rows:
                continue
            handle, answer = self._rows[row]
            if row.error is not None:
                self._end_row(row, row.error)
                continue
            if row.visual_tokens is not None:
                handle.visual_tokens = read(row.visual_tokens)
                row.visual_tokens = None
            logprob = row.logprobs[-1] if row.logprobs else None
            pieces = answer.add(
                row.tokens[-1], complete=row.complete, logprob=logprob, reused=row.reused, joined=row.joined
            )
            handle.add(pieces)
            if pieces[-1].finish_reason is not None:
                self._end_row(row)

    def _end_row(self, row: Row, error: BaseException | None = None) -> None:
        row.cancelled = True
        handle, _ = self._rows.pop(row)
        self.end(handle, error)
