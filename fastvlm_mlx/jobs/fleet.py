"""Several `fastvlm serve` at work: asked at the same time, each as much as it has room for."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

from fastvlm_mlx.errors import FastVLMError, ServerError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.exchange import Address, Exchange, LostError
from fastvlm_mlx.jobs.keeper import Keeper
from fastvlm_mlx.jobs.peer import Peer, Question, State
from fastvlm_mlx.jobs.remote import BusyError, Holds, OtherError, ask
from fastvlm_mlx.jobs.task import Task

_MOST_LOSSES = 5
"""Servers that may be lost with a question before it is taken for the reason."""
_LATE_SECONDS = 10.0
"""After which a question is asked of another server, too, if that one has nothing else to do."""
_MOST_BYTES = 512 << 20
"""Of pictures that are on their way."""
_MOST_THREADS = 1024


class _Group:
    """The questions about one picture; one server answers them one after another, as it then knows the picture."""

    def __init__(self, image: Any, peer: Peer | None = None) -> None:
        self.image = image
        self.peer = peer
        self.waiting: deque[Question] = deque()
        self.is_open = True

    def read(self) -> Encoded:
        """The picture's file."""
        return read(self.image[0] if isinstance(self.image, list) else self.image)


class Fleet:
    """Has several servers answer requests about one picture each.

    Each server gets as many questions as it answers at the same time and two more, fewer while it says that it is full,
    and the next one when it has answered. What is on its way to one that does not answer goes to the others; it is
    tried again, and used again when it answers as before. What a request fails for everywhere is the error of its
    handle. If there is no server left, all handles end as if they were cancelled, and `failure` says why.

    Args:
        addresses: The servers.
        key: For all of them; empty for none.
        schema: The schema of requests that have one, as the user has given it.
        most: The most questions on their way to each server; None for what suits it.
        notify: Called with lines for the user, from several threads.

    Attributes:
        processor: None, since servers prepare pictures.
        failure: Why nobody answers any more.

    Raises:
        ServerError: If no server answers, one is of another version or wants another key, or they hold different
            models.
    """

    processor = None

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        key: str = "",
        schema: Any = None,
        most: int | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._lock = threading.RLock()
        self._keeper = Keeper(
            addresses,
            key=key,
            most=most,
            lock=self._lock,
            notify=notify,
            opened=self._opened,
            ended=self._ended,
        )
        self._peers = self._keeper.peers
        self._schema = schema
        self._room = threading.Condition(self._lock)
        self._pending: deque[_Group] = deque()
        self._latest: _Group | None = None
        self._open: set[Question] = set()
        self._bytes = 0
        self._closed = False
        self.failure: ServerError | None = None
        self._keeper.connect()

    @property
    def holds(self) -> Holds:
        """What all its servers hold."""
        return self._keeper.holds

    @property
    def shares(self) -> list[tuple[str, int]]:
        """How many questions each server has answered."""
        return [(str(peer.address), peer.answers) for peer in self._peers]

    def check_model(self, model: str) -> None:
        """Raises if the servers hold another model than the one that is named.

        Raises:
            ServerError: If so.
        """
        wanted = {model.lower(), model.rstrip("/").rpartition("/")[2].lower()}
        if not wanted & set(self.holds.names):
            raise ServerError(f"the servers hold {names([self.holds.name])}, not {printable(model, 60)}")

    def start(self, task: Task) -> None:
        """Begins to look after the servers, after checking that they allow what a task needs.

        Raises:
            ServerError: If one does not.
        """
        self._keeper.start(task)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what is not done."""
        self._end_all()

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room.

        Raises:
            CancelledError: If there is no server left.
        """
        question = Question(Handle(request))
        with self._lock:
            while len(self._pending) > 2 * len(self._peers) and not self._closed:
                self._room.wait()
            if self._closed:
                raise CancelledError
            self._open.add(question)
            group = self._latest
            if group is None or group.image is not request.image or not group.is_open:
                before = group.peer if group is not None and group.image is request.image else None
                group = self._latest = _Group(request.image, before)
                self._pending.append(group)
            group.waiting.append(question)
            self._wake_one()
        return question.handle

    def _opened(self, peer: Peer) -> None:
        """Has a server take what waits, and what another one has had for very long."""
        for _ in range(min(len(self._pending), peer.limit) or (self._late(peer) is not None)):
            self._wake(peer)

    def _wake_one(self) -> None:
        """Has the server with room that will answer soonest take what waits."""
        takers = [peer for peer in self._peers if peer.takes] if self._pending else ()
        if takers:
            self._wake(min(takers, key=lambda peer: (peer.active + 1) * peer.seconds))

    def _wake(self, peer: Peer) -> None:
        if peer.sleeping:
            peer.idle.notify()
        elif peer.threads < min(peer.limit, max(1, _MOST_THREADS // len(self._peers))):
            peer.threads += 1
            threading.Thread(target=self._work, args=[peer], name="fastvlm-ask", daemon=True).start()

    def _work(self, peer: Peer) -> None:
        """Asks a server, again and again; for a thread of its own."""
        exchange = peer.exchange()
        while (group := self._take(peer)) is not None:
            try:
                self._ask_group(peer, group, exchange)
            finally:
                with self._lock:
                    peer.active -= 1
                    self._wake_one()
        exchange.close()

    def _take(self, peer: Peer) -> _Group | None:
        """The next questions for a server; None at the end."""
        with self._lock:
            while not self._closed:
                group = self._next(peer) if peer.takes else None
                if group is not None:
                    peer.active += 1
                    self._room.notify()
                    return group
                peer.sleeping += 1
                peer.idle.wait()
                peer.sleeping -= 1
            return None

    def _next(self, peer: Peer) -> _Group | None:
        for group in self._pending:
            if group.peer in (None, peer) or group.peer.state is not State.OPEN:
                group.peer = peer
                self._pending.remove(group)
                return group
        late = self._late(peer)
        if late is None:
            return None
        late.repeated = True
        group = _Group(late.handle.request.image, peer)
        group.waiting.append(late)
        return group

    def _late(self, peer: Peer) -> Question | None:
        """A question that another server has had for very long, if nothing else is to do."""
        if self._pending:
            return None
        now = time.monotonic()
        for other in self._peers:
            patience = max(_LATE_SECONDS, 4 * other.seconds)
            for question, (_, began) in other.questions.items():
                if other is not peer and not question.repeated and now - began > patience:
                    return question
        return None

    def _ask_group(self, peer: Peer, group: _Group, exchange: Exchange) -> None:
        """Asks a server the questions about one picture; what it does not answer waits for another one."""
        size = 0
        try:
            encoded = group.read()
            size = self._reserve(len(encoded.data) * 7 // 3)
            while (question := self._begin(peer, group, exchange)) is not None:
                if self._ask(peer, question, encoded, exchange):
                    group.waiting.appendleft(question)
                    break
        except (FastVLMError, MemoryError) as error:
            self._fail(group, error)
        finally:
            with self._lock:
                self._bytes -= size
                group.is_open = False
                if group.waiting and not self._closed:
                    group.peer, group.is_open = None, True
                    self._pending.appendleft(group)

    def _reserve(self, size: int) -> int:
        """Waits until a picture of so many bytes may be on its way, too."""
        with self._lock:
            while self._bytes and self._bytes + size > _MOST_BYTES and not self._closed:
                self._room.wait(1.0)
            self._bytes += size
        return size

    def _fail(self, group: _Group, error: BaseException) -> None:
        """Ends all questions about a picture that cannot be read."""
        with self._lock:
            group.is_open = False
            failed, group.waiting = list(group.waiting), deque()
        for question in failed:
            self._end(question, error)

    def _begin(self, peer: Peer, group: _Group, exchange: Exchange) -> Question | None:
        """The next question about a picture, which is on its way from now on; None if this server gets no more."""
        with self._lock:
            while group.waiting and group.waiting[0].done:
                group.waiting.popleft()
            if self._closed or not group.waiting or not peer.is_well:
                group.is_open = bool(group.waiting)
                return None
            question = group.waiting.popleft()
            exchange.renew()
            peer.questions[question] = (exchange, time.monotonic())
            return question

    def _ask(self, peer: Peer, question: Question, encoded: Encoded, exchange: Exchange) -> bool:
        """Asks a server one question and ends its handle; returns whether it has to be asked again, of anybody."""
        assert peer.holds is not None
        begun = time.monotonic()
        error: BaseException | None = None
        result = None
        try:
            result = ask(exchange, question.handle.request, encoded, peer.holds, self._schema)
        except (FastVLMError, MemoryError) as err:
            error = err
        with self._lock:
            peer.questions.pop(question, None)
            if question.done or self._closed:
                return False
            if isinstance(error, BusyError):
                peer.busy(error.retry_after)
                return True
            if isinstance(error, OtherError):
                self._keeper.leave_out(peer, str(error))
                return True
            if isinstance(error, LostError):
                if peer.state is State.OPEN:
                    peer.lost(str(error))
                question.losses += 1
                if question.losses < _MOST_LOSSES:
                    return True
                error = ServerError(f"{encoded.name}: {_MOST_LOSSES} servers were lost with it, the last one: {error}")
            else:
                peer.answered(time.monotonic() - begun)
        self._end(question, error, result)
        return False

    def _end(self, question: Question, error: BaseException | None, result: GenerationResult | None = None) -> None:
        """Ends a handle, once; another server that has the question is told that it is not needed."""
        with self._lock:
            if question.done:
                return
            question.done = True
            self._open.discard(question)
            for peer in self._peers:
                if question in peer.questions:
                    peer.questions[question][0].cut()
        if result is not None:
            question.handle.add([result])
        question.handle.end(error)

    def _ended(self, failure: ServerError) -> None:
        """Ends everything, since there is no server any more."""
        self.failure = failure
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            self._closed = True
            self._room.notify_all()
            left = list(self._open)
        self._keeper.close()
        for question in left:
            self._end(question, CancelledError())
