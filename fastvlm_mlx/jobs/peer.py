"""The state of one server among several: whether it answers, how much it takes at a time, and how fast it is."""

import ssl
import threading
import time
from enum import Enum

from fastvlm_mlx.generation.request import Handle
from fastvlm_mlx.jobs.exchange import Address, Exchange
from fastvlm_mlx.jobs.remote import Holds

_AHEAD = 2
"""Questions that wait at a server, so that it never waits for one."""
_STRIKES = 3
"""Failures one after another after which a server that can be reached rests, too."""
_LONGEST_PAUSE = 4.0
"""Seconds between two looks at a server that does not answer."""
_LONGEST_REST = 30.0
"""Seconds for which a server rests that answers but cannot be used."""
SILENT_SECONDS = 5.0
"""Without a word from a server that owes answers, after which it is asked how it is."""


class State(Enum):
    """How a server is."""

    OPEN = "answers"
    RESTING = "does not answer, and is tried again"
    OUT = "holds something else; it is tried again, too, but seldom"


class Question:
    """A request on its way.

    Attributes:
        handle: Of the request.
        losses: How many servers were lost with it.
        done: Whether its handle has ended, or is about to.
        repeated: Whether two servers have it.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.losses = 0
        self.done = False
        self.repeated = False


class Peer:
    """One server. Its fields are read and written under the lock of its fleet.

    Attributes:
        address: Where it listens.
        holds: What it holds; None as long as it has never answered.
        state: How it is.
        reason: Why it does not answer.
        since: When it has stopped to answer, by `time.monotonic`.
        suspect: Whether a question has just been lost; its keeper looks after it.
        questions: On their way to it, each with the connection and the time at which it was sent.
        answers: How many it has given.
        seconds: That an answer takes, a mean in which older ones count less and less.
        threads: How many ask it.
        sleeping: How many of those have nothing to do.
        idle: For those.
        changed: For its keeper.
    """

    def __init__(
        self, address: Address, key: str, context: ssl.SSLContext | None, most: int | None, lock: threading.RLock
    ) -> None:
        self.address = address
        self.holds: Holds | None = None
        self.state = State.RESTING
        self.reason = ""
        self.since = time.monotonic()
        self.suspect = False
        self.questions: dict[Question, tuple[Exchange, float]] = {}
        self.answers = 0
        self.seconds = 0.0
        self.threads = self.sleeping = self.active = 0
        self.idle = threading.Condition(lock)
        self.changed = threading.Condition(lock)
        self._key, self._context = key, context
        self._most = most
        self._allowed = 0.0
        self._paused = 0.0
        self._heard = 0.0
        self._strikes = 0

    def exchange(self) -> Exchange:
        """A connection to it."""
        return Exchange(self.address, self._key, self._context)

    @property
    def limit(self) -> int:
        """The most questions that are on their way to it."""
        return self._most or (self.holds.max_batch + _AHEAD if self.holds else 0)

    @property
    def is_well(self) -> bool:
        """Whether it answers, as far as is known."""
        return self.state is State.OPEN and not self.suspect

    @property
    def takes(self) -> bool:
        """Whether it has room for a question now."""
        return self.is_well and self.active < int(self._allowed) and time.monotonic() >= self._paused

    @property
    def is_silent(self) -> bool:
        """Whether it owes answers and has said nothing for so long that it may have stopped."""
        now = time.monotonic()
        oldest = min((began for _, began in self.questions.values()), default=now)
        return now - max(oldest, self._heard) > SILENT_SECONDS

    def answered(self, seconds: float) -> None:
        """Notes an answer; little by little it gets more questions again, if it had too many."""
        self.answers += 1
        self.seconds = seconds if not self.seconds else 0.8 * self.seconds + 0.2 * seconds
        self._strikes = 0
        self._paused = 0.0
        self._allowed = min(self._allowed + 1 / max(self._allowed, 1), self.limit)
        self.heard()

    def heard(self) -> None:
        """Notes that it has said something."""
        self._heard = time.monotonic()

    def busy(self, retry_after: float) -> None:
        """Notes that it has no room: other clients may be asking it, too."""
        self._allowed = max(1.0, self.active - 1.0)
        self._paused = time.monotonic() + retry_after
        self.heard()

    def lost(self, reason: str) -> None:
        """Notes that a question was lost, which its keeper finds the reason for."""
        self.reason = reason
        if not self.suspect:
            self.suspect = True
            self._strikes += 1
        self.changed.notify()

    def opened(self, holds: Holds) -> None:
        """Notes that it answers."""
        if self.state is not State.OPEN or self.holds != holds:
            self.holds = holds
            self._allowed = 1.0 if self.is_bad else float(self.limit)
        self.state, self.suspect = State.OPEN, False
        self._paused = 0.0
        self.heard()

    def closed(self, state: State, reason: str) -> None:
        """Notes that it does not answer, and ends what is on its way to it."""
        if self.state is State.OPEN or not self.holds:
            self.since = time.monotonic()
        self.state, self.reason, self.suspect = state, reason, False
        for exchange, _ in self.questions.values():
            exchange.cut()

    @property
    def is_bad(self) -> bool:
        """Whether it has failed several times one after another, although it can be reached."""
        return self._strikes >= _STRIKES

    def rest(self, tries: int) -> float:
        """Seconds to wait before it is looked at for another time."""
        if self.state is State.OUT:
            return _LONGEST_REST
        bad = self._strikes - _STRIKES
        return max(min(0.5 * 2.0 ** min(tries, 9), _LONGEST_PAUSE), min(0.5 * 2.0 ** min(bad, 9), _LONGEST_REST))
