"""The model behind a server: its names, its state, and the way to its engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias, TypeVar

from fastvlm_mlx.errors import ConfigError, QueueFullError
from fastvlm_mlx.formatting import counted, names
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.album import ServedAlbum
from fastvlm_mlx.server.answering import Answering
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.metrics import Metrics
from fastvlm_mlx.server.settings import Settings

_T = TypeVar("_T")
State: TypeAlias = Literal["loading", "ready", "stopping", "failed"]

LOADING_SECONDS = 5.0
"""After which a client may ask again while the model loads."""
LONGEST_RETRY = 120.0
"""OpenAI's clients wait no longer than this."""
READING_THREADS = 16
"""For requests of many megabytes, and for images that are fetched."""
STALLED_SECONDS = 300.0
"""A step that takes longer counts as a dead engine."""


class Service:
    """The model behind a server.

    The event loop's thread uses it, and the one that loads the model calls `start`.

    Args:
        name: The model's name, as clients see it.
        settings: What the server allows.
        aliases: Other names that clients may use.
        album: What can be searched.

    Attributes:
        album: What can be searched; None for nothing.
        name: The model's name.
        aliases: Other names that clients may use.
        settings: What the server allows.
        state: `loading` until `start`, `stopping` after `stop`.
        created: When the model was made, in seconds since 1970.
        fingerprint: Stands for weights and version.
        weights: The `checkpoint_fingerprint` of the model; empty while it loads.
        dtype: What it computes in; empty while it loads.
        license: Of the weights; empty if unknown.
        max_model_len: The most positions of prompt and answer together.
        native_resolution: Pixels per side that the weights are tuned at.
        parameters: The number of its weights; 0 if unknown.
        size_bytes: The bytes of its tensors on disk; 0 if unknown.
        engine: What answers; None while the model loads.
        activity: What loading does now, for people; empty if nothing is known.
        metrics: What is counted.
    """

    def __init__(
        self, name: str, settings: Settings, *, aliases: Sequence[str] = (), album: ServedAlbum | None = None
    ) -> None:
        self.name = name
        self.album = album
        self.aliases = tuple(aliases)
        self.settings = settings
        self.state: State = "loading"
        self.created = int(time.time())
        self.fingerprint = ""
        self.weights = ""
        self.dtype = ""
        self.license = ""
        self.max_model_len = 0
        self.native_resolution = 0
        self.parameters = 0
        self.size_bytes = 0
        self.engine: Engine | None = None
        self.activity = ""
        self._readers = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="fastvlm-read")
        self._open: set[Answering] = set()
        self._rate = Rate()
        self.metrics = Metrics(name)
        self._watch()

    def start(self, engine: Engine) -> None:
        """Begins to answer."""
        self.engine = engine
        self.activity = ""
        self.max_model_len = engine.processor.context_length
        self.native_resolution = engine.processor.image_size
        if self.state == "loading":
            self.state = "ready"
        if self.album is not None:
            self.album.start(engine, self.name, self.weights, is_busy=lambda: self.running > 0)

    def _watch(self) -> None:
        """Adds to the metrics what is asked for when they are read."""

        def answering() -> int:
            return self.engine.answering if self.engine else 0

        watch = self.metrics.watch
        watch("num_requests_running", "Requests that get tokens now.", answering)
        watch("num_requests_waiting", "Requests that wait for that.", lambda: max(0, self.running - answering()))
        watch(
            "kv_cache_usage_perc",
            "The part, from 0 to 1, of the memory for keys and values that is taken.",
            lambda: self.engine.kv_usage if self.engine else 0.0,
        )

    def stop(self) -> None:
        """Takes no more questions."""
        self.state = "stopping"
        self._readers.shutdown(wait=False)

    def cancel_all(self) -> None:
        """Ends the answers on their way, with an error that says why."""
        for answering in list(self._open):
            answering.fail(self.unavailable())

    async def idle(self, seconds: float) -> bool:
        """Whether nothing is on its way, after waiting for that, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._open

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread lives, or the model is still loading."""
        if self.engine is None:
            return self.state != "failed"
        return self.engine.is_alive and self.engine.step_seconds < STALLED_SECONDS

    @property
    def most_requests(self) -> int:
        """The most answers that one question may ask for."""
        room = self.engine.max_batch + self.settings.max_queue if self.engine else 1
        return min(self.settings.max_choices, room)

    @property
    def running(self) -> int:
        """Requests on their way; for any thread."""
        return sum(len(answering.handles) for answering in list(self._open))

    def serves(self, model: str) -> bool:
        """Whether a name is the model's; an empty one is."""
        known = [self.name, *self.aliases]
        return not model or model.removesuffix(":latest").lower() in [name.lower() for name in known]

    def check(self, model: str) -> None:
        """Checks a model's name.

        Raises:
            ApiError: 404, if it is another model's.
        """
        if not self.serves(model):
            raise ApiError(
                404,
                f"there is no model {shown(model)} here; the one served is {names([self.name])}",
                param="model",
                code="model_not_found",
            )

    def unavailable(self) -> ApiError:
        """The error for a question in a state in which none is answered."""
        reasons = {"loading": "the model is still loading", "stopping": "the server is stopping"}
        reason = reasons.get(self.state, "the engine has stopped; restart the server")
        return ApiError(503, reason, kind="server_error", code="unavailable", retry_after=LOADING_SECONDS)

    def late(self, seconds: float) -> ApiError:
        """The error for a question that has waited so long for its first token."""
        return ApiError(
            503,
            f"the request waited longer than {seconds:g} s; ask again later",
            kind="server_error",
            code="queue_timeout",
            retry_after=self.retry_after(),
        )

    def full(self, what: str) -> ApiError:
        """The error for a question that there is no room for."""
        return ApiError(
            429, f"{what}; ask again later", kind="rate_limit_error", code="queue_full", retry_after=self.retry_after()
        )

    def retry_after(self) -> float:
        """Seconds in which half of what is on its way will be answered, at the measured rate."""
        return min(max(1.0, math.ceil(self.running * self._rate.seconds / 2)), LONGEST_RETRY)

    def check_ready(self, requests: int = 1) -> None:
        """Checks that questions are answered now, and that there is room for some.

        Raises:
            ApiError: 503 or 429, if not.
        """
        if self.state != "ready" or self.engine is None or not self.engine.is_alive:
            raise self.unavailable()
        if self.running + requests > self.engine.max_batch + self.settings.max_queue:
            raise self.full(f"the queue is full ({counted(self.running, 'request')} on their way)")

    async def in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """What a function returns that takes too long for the event loop.

        Raises:
            ApiError: 503, if the server is stopping.
        """
        try:
            future = asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)
        except RuntimeError as err:  # there are no threads any more
            raise self.unavailable() from err
        return await future

    def submit(self, requests: Sequence[Request]) -> Answering:
        """Hands questions to the engine.

        Raises:
            ApiError: If they are not answered now.
        """
        self.check_ready(len(requests))
        assert self.engine is not None
        answering = Answering()
        try:
            for request in requests:
                answering.handles.append(self.engine.submit(request, wait=False, on_change=answering.wake))
        except QueueFullError as err:  # those that were cancelled have a place until the next step
            answering.cancel()
            raise self.full("the queue is full") from err
        except ConfigError as err:  # the engine has ended at this moment
            answering.cancel()
            raise self.unavailable() from err
        if len(self._open) == 0:
            self._rate.begin()
        self._open.add(answering)
        return answering

    def leave(self, answering: Answering) -> None:
        """Cancels what is left of an answer; call it once for each that `submit` gave."""
        if answering.is_whole:
            self._rate.add(len(answering.handles))
        answering.cancel()
        self._open.discard(answering)


class Rate:
    """How long one answer takes while there is something to do: a mean in which older ones count less and less.

    Attributes:
        seconds: For one answer; 1 before the first one.
    """

    def __init__(self) -> None:
        self.seconds = 1.0
        self._known = False
        self._latest = 0.0

    def begin(self) -> None:
        """Notes that there is something to do again."""
        self._latest = time.monotonic()

    def add(self, answers: int) -> None:
        """Notes answers that have been given."""
        now = time.monotonic()
        seconds, self._latest = (now - self._latest) / answers, now
        self.seconds = 0.9 * self.seconds + 0.1 * seconds if self._known else seconds
        self._known = True
