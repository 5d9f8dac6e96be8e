"""Asks the workers of a cluster many questions at once, as an `Engine` of this process would be asked."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from fastvlm_mlx.cluster.member import SUSPECT, Call, Job, Member, asked_of
from fastvlm_mlx.cluster.worker import Outcome
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.request import Handle, Request

_DEATHS = 5
"""Workers that have to end while they answer a question before it counts as the cause."""
_SILENCE = 30.0
"""Seconds without an answer after which others answer what a worker was asked, unless it needed as long before."""
_LONGEST = 10.0
"""How many times as long as its longest answer a worker may be silent."""
_TICK = 1.0


class ClusterEngine:
    """Has the workers of a cluster answer requests about one picture each.

    Each worker gets as many as it can answer at the same time, and as many behind them, in a few calls. What a worker
    was asked that ends or falls silent is asked again of another, and the first answer counts. A question over which
    two have ended is asked alone.

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
        self._members = [Member(actor) for actor in actors]
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
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
        job = Job(Handle(request))
        with self._changed:
            self._changed.wait_for(lambda: self.failure or len(self._waiting) < self._most_waiting)
            if self.failure is not None:
                raise CancelledError
            self._waiting.append(job)
        self._events.put(self._assign)
        return job.handle

    @property
    def _most_waiting(self) -> int:
        """A call for each worker."""
        return sum(member.size for member in self._members)

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
        asked = (job for member in self._members for call in member.open for job in call.jobs)
        with self._changed:
            left = {*self._waiting, *self._suspects, *asked}
            self._waiting.clear()
            self._suspects.clear()
            self._changed.notify_all()
        for job in left:
            job.handle.end(CancelledError())

    def _assign(self) -> None:
        """Gives what waits to workers with room, first to those with the most."""
        tester = self._test()
        while True:
            able = [member for member in self._members if member is not tester and member.room > 0]
            if not able:
                return
            member = max(able, key=lambda each: each.room)
            jobs = self._take(member.size)
            if not jobs:
                return
            self._ask(member, jobs)

    def _test(self) -> Member | None:
        """Asks suspects, each of a worker that has nothing else; returns one that gets nothing more until then."""
        while self._suspects:
            able = [member for member in self._members if member.room > 0]
            member = min(able, key=lambda each: len(each.open), default=None)
            if member is None or member.open:
                return member
            job = self._suspects.popleft()
            if not job.handle.done:
                self._ask(member, [job])
        return None

    def _take(self, count: int) -> list[Job]:
        """At most so many of the questions that wait."""
        jobs: list[Job] = []
        with self._changed:
            while self._waiting and len(jobs) < count:
                job = self._waiting.popleft()
                if job.handle.cancelled:
                    job.handle.end()
                elif not job.handle.done:
                    jobs.append(job)
            self._changed.notify_all()
        return jobs

    def _ask(self, member: Member, jobs: Sequence[Job]) -> None:
        """Asks a worker questions in one call; those whose picture cannot be read here end."""
        asked = []
        call = Call([], time.monotonic())
        for job in jobs:
            try:
                asked.append(asked_of(job.handle.request, member.sees_files))
            except FastVLMError as err:
                job.handle.end(err)
            else:
                call.jobs.append(job)
                job.holders.add(member)
        if not asked:
            return
        if not member.open:
            member.heard = max(member.heard, call.since)
        member.open.add(call)
        answer = member.actor.answer.options(max_task_retries=0).remote(asked)
        answer.future().add_done_callback(
            lambda future: self._events.put(partial(self._answered, member, call, future))
        )

    def _answered(self, member: Member, call: Call, future: Any) -> None:
        """Ends questions with the answers of a worker, or asks them again."""
        member.open.discard(call)
        member.heard, member.silent = time.monotonic(), False
        for job in call.jobs:
            job.holders.discard(member)
        try:
            outcomes: Sequence[Outcome] = future.result()
        except self._ray.exceptions.RayError as err:
            if isinstance(err, self._ray.exceptions.RayActorError):
                self._lose(member)
            for job in call.jobs:
                self._ask_again(job, err)
        else:
            self._longest = max(self._longest, member.heard - call.since)
            absent = [self._end(member, *each) for each in zip(call.jobs, outcomes, strict=True)]
            if any(absent):
                member.sees_files = False
                self._ask(member, [job for job, is_absent in zip(call.jobs, absent, strict=True) if is_absent])
        self._assign()

    def _end(self, member: Member, job: Job, outcome: Outcome) -> bool:
        """Ends a question; returns whether the worker needs its picture for that."""
        if job.handle.done:
            return False  # another one was faster
        if outcome.absent:
            return True
        if outcome.refused is not None:
            self._part(member, str(outcome.refused))
            self._requeue(job)
            return False
        if outcome.error is None:
            job.handle.add([outcome.result])
        job.handle.end(outcome.error)
        return False

    def _ask_again(self, job: Job, error: BaseException) -> None:
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

    def _requeue(self, job: Job) -> None:
        held = any(not member.silent for member in job.holders)
        if job.handle.done or held or job in self._waiting or job in self._suspects:
            return
        with self._changed:
            if job.deaths >= SUSPECT:
                self._suspects.append(job)
            else:
                self._waiting.appendleft(job)

    def _lose(self, member: Member) -> None:
        """Leaves out a worker that has ended until Ray has started it again."""
        if member.calls:
            member.calls = 0
            self._notify("a worker has ended; Ray starts it again, and others answer what it was asked")
            self._await(member)

    def _await(self, member: Member) -> None:
        ready = member.actor.ready.options(max_task_retries=-1).remote()
        ready.future().add_done_callback(lambda future: self._events.put(partial(self._ready, member, future)))

    def _ready(self, member: Member, future: Any) -> None:
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
            member.take(said)
        self._assign()

    def _part(self, member: Member, reason: str) -> None:
        """Leaves out a worker for good; without any, nothing can be answered."""
        if not member.gone:
            self._notify(reason)
        member.gone, member.calls = reason, 0
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
                left = [job for call in member.open for job in call.jobs if not job.handle.done]
                with self._changed:
                    self._waiting.extendleft(job for job in left if job not in self._waiting)
        self._assign()
