"""Asks the workers of a cluster many questions at once, as an `Engine` of this process would be asked."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastvlm_mlx.cluster.nodes import CALLS
from fastvlm_mlx.cluster.worker import Outcome, Place
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.inputs.sources import read

_BEHIND = 2
"""Questions that wait at a worker behind those that it answers, so that it never waits for the network."""
_DEATHS = 5
"""Workers that have to end while they answer a question before it counts as the cause."""
_SILENCE = 30.0
"""Seconds without an answer after which others answer what a worker was asked, unless it needed as long before."""
_LONGEST = 10.0
"""How many times as long as its longest answer a worker may be silent."""
_TICK = 1.0


@dataclass(eq=False)
class _Job:
    """A question on its way: whom it was asked, how many ended over it, and when it was asked last."""

    handle: Handle
    deaths: int = 0
    since: float = 0.0
    holders: set[_Member] = field(default_factory=set)


@dataclass(eq=False)
class _Member:
    """A worker: how many questions it takes, and what it is busy with.

    Attributes:
        actor: Ray's handle.
        room: Questions at a time; 0 until it is ready.
        open: What it was asked and has not answered.
        sees_files: Whether it reads pictures itself.
        heard: When it last said something.
        silent: Whether it is left out until it answers again.
        gone: Why it will never answer.
    """

    actor: Any
    room: int = 0
    open: set[_Job] = field(default_factory=set)
    sees_files: bool = True
    heard: float = 0.0
    silent: bool = False
    gone: str = ""


class ClusterEngine:
    """Has the workers of a cluster answer requests about one picture each.

    Each worker gets as many as it can answer at the same time. What a worker was asked that ends or falls silent is
    asked again of another, and the first answer counts.

    Args:
        ray: The module, connected.
        actors: From `start_workers`.
        notify: Called with a line about workers that end.

    Attributes:
        processor: None, since the workers prepare pictures.
        failure: Why nobody answers any more; None while somebody does. What is not done is then cancelled.
    """

    processor = None

    def __init__(self, ray: Any, actors: Sequence[Any], notify: Callable[[str], None]) -> None:
        self._ray, self._notify = ray, notify
        self._members = [_Member(actor) for actor in actors]
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.failure: FastVLMError | None = None
        self._longest = 0.0
        self._thread = threading.Thread(target=self._run, name="fastvlm-cluster", daemon=True)

    def __enter__(self) -> ClusterEngine:
        for member in self._members:
            self._await(member)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels what is not done, and ends the workers."""
        self._events.put(None)
        self._thread.join()
        for member in self._members:
            self._ray.kill(member.actor)

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room.

        Raises:
            CancelledError: If no worker is left.
        """
        job = _Job(Handle(request))
        with self._changed:
            self._changed.wait_for(lambda: self.failure or len(self._waiting) < len(self._members))
            if self.failure is not None:
                raise CancelledError
            self._waiting.append(job)
        self._events.put(self._assign)
        return job.handle

    def _run(self) -> None:
        """The thread that alone changes what workers are asked."""
        while True:
            try:
                event = self._events.get(timeout=_TICK)
            except queue.Empty:
                event = self._look_for_silence
            if event is None:
                break
            event()
        self._cancel()

    def _cancel(self) -> None:
        """Cancels what is not done."""
        with self._changed:
            left = {*self._waiting, *(job for member in self._members for job in member.open)}
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.handle.end(CancelledError())

    def _assign(self) -> None:
        """Gives what waits to workers with room, first to those with the most."""
        while True:
            able = [m for m in self._members if not m.silent and len(m.open) < m.room]
            with self._changed:
                if not self._waiting or not able:
                    return
                job = self._waiting.popleft()
                self._changed.notify_all()
            if job.handle.cancelled:
                job.handle.end()
            elif not job.handle.done:
                self._ask(max(able, key=lambda m: m.room - len(m.open)), job)

    def _ask(self, member: _Member, job: _Job) -> None:
        request = job.handle.request
        source: Any = request.image[0] if isinstance(request.image, list) else request.image
        is_path = isinstance(source, str) and "://" not in source
        place = Place.of(source) if is_path and member.sees_files else None
        if place is not None:
            request = replace(request, image=None)
        elif is_path:
            try:
                sent: list[Any] = [read(source)]
                request = replace(request, image=sent)
            except FastVLMError as err:
                job.handle.end(err)
                return
        member.open.add(job)
        job.holders.add(member)
        job.since = time.monotonic()
        member.heard = max(member.heard, job.since) if len(member.open) == 1 else member.heard
        answer = member.actor.answer.options(max_task_retries=0).remote(request, place)
        answer.future().add_done_callback(lambda future: self._events.put(partial(self._answered, member, job, future)))

    def _answered(self, member: _Member, job: _Job, future: Any) -> None:
        """Ends a question with the answer of a worker, or asks it again."""
        member.open.discard(job)
        job.holders.discard(member)
        member.heard, member.silent = time.monotonic(), False
        try:
            outcome: Outcome = future.result()
        except self._ray.exceptions.RayError as err:
            if isinstance(err, self._ray.exceptions.RayActorError):
                self._lose(member)
            self._ask_again(job, err)
        else:
            self._longest = max(self._longest, member.heard - job.since)
            if job.handle.done:
                pass  # another one was faster
            elif outcome.absent:
                member.sees_files = False
                self._ask(member, job)
            elif outcome.refused is not None:
                self._part(member, str(outcome.refused))
                self._requeue(job)
            else:
                if outcome.error is None:
                    job.handle.add([outcome.result])
                job.handle.end(outcome.error)
        self._assign()

    def _ask_again(self, job: _Job, error: BaseException) -> None:
        job.deaths += 1
        if job.handle.done:
            return
        if job.deaths >= _DEATHS:
            source: Any = job.handle.request.image
            reason = str(error).strip().splitlines()[-1]
            job.handle.end(
                ImageError(f"{printable(source)}: {job.deaths} workers ended while they answered ({reason})")
            )
        else:
            self._requeue(job)

    def _requeue(self, job: _Job) -> None:
        held = any(not member.silent for member in job.holders)
        if not job.handle.done and not held and job not in self._waiting:
            with self._changed:
                self._waiting.appendleft(job)

    def _lose(self, member: _Member) -> None:
        """Leaves out a worker that has ended until Ray has started it again."""
        if member.room:
            member.room = 0
            self._notify("a worker has ended; Ray starts it again, and others answer what it was asked")
            self._await(member)

    def _await(self, member: _Member) -> None:
        ready = member.actor.ready.options(max_task_retries=-1).remote()
        ready.future().add_done_callback(lambda future: self._events.put(partial(self._ready, member, future)))

    def _ready(self, member: _Member, future: Any) -> None:
        member.heard = time.monotonic()
        try:
            said = future.result()
        except self._ray.exceptions.RayError as err:
            reason = str(err).strip().splitlines()[-1]
            gone = "owner has died" in reason
            said = ConfigError("Ray has ended on this machine" if gone else f"a worker cannot start ({reason[:200]})")
        if isinstance(said, FastVLMError):
            self._part(member, str(said))
        else:
            member.room = min(said + _BEHIND, CALLS - 1)
        self._assign()

    def _part(self, member: _Member, reason: str) -> None:
        """Leaves out a worker for good; without any, nothing can be answered."""
        if not member.gone:
            self._notify(reason)
        member.gone, member.room = reason, 0
        if all(each.gone for each in self._members):
            self.failure = ConfigError(f"no worker is left: {reason}")
            self._cancel()

    def _look_for_silence(self) -> None:
        """Asks others what a worker was asked that has said nothing for long, such as one that hangs."""
        patience = max(_SILENCE, _LONGEST * self._longest)
        for member in self._members:
            if member.open and not member.silent and time.monotonic() - member.heard > patience:
                member.silent = True
                self._notify(f"a worker has said nothing for {patience:.0f} s; others answer what it was asked")
                with self._changed:
                    self._waiting.extendleft(job for job in member.open if not job.handle.done)
        self._assign()
