"""A camera or screen by the clock: what it shows is told as soon as it has changed, and only while it is there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastvlm_mlx.generation.result import GenerationResult, whole
from fastvlm_mlx.watch.changes import LEAST_CHANGE, Look, Scenes, is_dark, sign
from fastvlm_mlx.watch.newest import Arrived, Newest
from fastvlm_mlx.watch.outputs import Cue
from fastvlm_mlx.watch.sentences import Sentences, same, says_nothing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.generation.request import Handle, Request

_STARVED = 8.0
"""Seconds without a word after which it is said that scenes follow one another faster than answers come."""
_AGAIN = 60.0
"""Seconds after which that may be said again."""
_TICK = 0.25
"""Seconds after which the loop looks around without being called: for the heartbeat."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """A sentence that is told.

    Attributes:
        text: The sentence.
        first: Whether it is the first one of a description.
        again: Whether to speak it though it was spoken before, since somebody asked for it.
        urgent: Whether what is being spoken is out of date or unwanted.
    """

    text: str
    first: bool
    again: bool = False
    urgent: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """An answer that has ended.

    Attributes:
        time: Seconds of the stream at its frame.
        text: What was told of it; all of it if nothing was.
        kind: Why the model was asked: `change`, `heartbeat`, `now` or `question`.
        question: That of a person.
        shown: Whether anything was told: not if it says the same as the one before.
        change: Levels by which the picture had changed.
        age: Seconds from the frame's arrival to the first sentence.
        result: The answer with its statistics.
        frames: That came so far.
        dropped: Of those, how many a newer one took the place of.
    """

    time: float
    text: str
    kind: str
    question: str | None
    shown: bool
    change: float
    age: float
    result: GenerationResult
    frames: int
    dropped: int


class Audience(Protocol):
    """Who is told; called in the thread that watches."""

    def sentence(self, told: Told) -> None:
        """A sentence, as soon as it is whole."""

    def description(self, description: Description) -> None:
        """An answer that has ended."""

    def cue(self, cue: Cue) -> None:
        """What could be seen, when it is gone."""

    def gone(self) -> None:
        """What was told last cannot be seen any more."""

    def note(self, message: str) -> None:
        """Something about the watching itself."""


@dataclass
class _Answer:
    """An answer on its way."""

    handle: Handle
    arrived: Arrived
    look: Look | None
    kind: str
    question: str | None = None
    sentences: Sentences = field(default_factory=Sentences)
    pieces: list[GenerationResult] = field(default_factory=list)
    waiting: deque[str] = field(default_factory=deque)
    told: list[str] = field(default_factory=list)
    all: list[str] = field(default_factory=list)
    ended: bool = False
    age: float = 0.0

    @property
    def by_person(self) -> bool:
        """Whether a person asked for it, who gets it whatever it says."""
        return self.kind in ("now", "question")


class Live:
    """Watches a stream: only its newest frame counts.

    The model is asked when the picture has changed and stands still, and about a picture that moves all the time,
    every `every` seconds. What is on its way is cancelled as soon as another scene is there, and a sentence waits while
    the picture changes, so that nothing is told of what is gone. Only the engine's thread uses the model.

    Args:
        newest: The frames.
        engine: Answers one request at a time.
        request: The request for a picture, and for a question of a person's if there is one.
        clean: Makes a sentence what is told.
        audience: Who is told.
        every: Seconds between two pictures that the model is asked about, at least.
        heartbeat: Seconds after which it is asked though nothing seems to have changed; 0 for never.
        least: See `Scenes`.
    """

    def __init__(
        self,
        newest: Callable[[Callable[[], None]], Newest],
        engine: Engine,
        request: Callable[[NDArray[Any], str | None], Request],
        *,
        clean: Callable[[str], str],
        audience: Audience,
        every: float = 0.0,
        heartbeat: float = 30.0,
        least: float = LEAST_CHANGE,
    ) -> None:
        self._bell = threading.Event()
        self._newest = newest(self._bell.set)
        self._engine = engine
        self._request = request
        self._clean = clean
        self._audience = audience
        self._every = every
        self._heartbeat = heartbeat
        self._scenes = Scenes(least, patience=max(every, 1.0))
        self._orders: deque[tuple[str, str | None]] = deque()
        self._arrived: Arrived | None = None
        self._look: Look | None = None
        self._answer: _Answer | None = None
        self._known: list[str] = []
        self._cue: tuple[float, str] | None = None
        self._cue_stood = True
        self._held: Arrived | None = None
        self._asked = 0.0
        self._silent: float | None = None
        self._is_paused = self._is_left = False

    @property
    def newest(self) -> Newest:
        """The frames."""
        return self._newest

    def order(self, what: str, question: str | None = None) -> None:
        """Does what a person wants, from any thread: `now`, `repeat`, `pause`, `hold`, `ask` or `leave`.

        `hold` is silence until `ask`, which has the question; None for none.
        """
        self._orders.append((what, question))
        self._bell.set()

    def run(self) -> None:
        """Watches until the stream ends or somebody leaves.

        Raises:
            FastVLMError: If the stream or an answer fails.
        """
        self._newest.start()
        try:
            while not self._is_left:
                self._bell.wait(_TICK)
                self._bell.clear()
                while self._orders:
                    self._obey(*self._orders.popleft())
                self._see()
                self._tell()
                self._begin()
                if self._newest.ended and (self._answer is None or self._is_doubtful(self._answer)):
                    break
        finally:
            self._cancel()
            self._end_cue(self._now())

    def _now(self) -> float:
        """The time of the stream."""
        return 0.0 if self._arrived is None else self._arrived.frame.time

    # Looking

    def _see(self) -> None:
        arrived = self._newest.take()
        if arrived is None:
            return
        self._arrived = arrived
        self._look = look = self._scenes.look(arrived.frame.time, sign(arrived.frame.pixels))
        if not (look.changed and look.settled):
            return
        if look.cut and self._cue is not None:
            self._end_cue(look.since if self._cue_stood else look.time)
            self._audience.gone()
        if self._answer is not None and not self._answer.by_person:
            self._cancel()
            self._starve()

    def _starve(self) -> None:
        """Says that scenes follow one another faster than answers come, once that has been so for a while."""
        now = time.monotonic()
        if self._silent is None:
            self._silent = now
        elif now - self._silent > _STARVED:
            self._silent = now + _AGAIN - _STARVED
            self._audience.note("the picture changes faster than it can be described")

    def _end_cue(self, moment: float) -> None:
        if self._cue is not None:
            start, text = self._cue
            self._cue = None
            self._audience.cue(Cue(start, max(moment, start), text))

    # Asking

    def _begin(self) -> None:
        """Asks about the newest picture if there is a reason."""
        look = self._look
        if self._answer is not None or self._is_paused or self._held is not None or look is None:
            return
        waited = time.monotonic() - self._asked
        is_due = bool(self._heartbeat) and not look.changed and waited >= self._heartbeat
        if not (look.ready or is_due) or waited < self._every:
            return
        self._scenes.accept(look)
        self._look = look._replace(changed=False, ready=False)
        self._asked = time.monotonic()
        if not is_dark(look.signature):
            self._submit("change" if look.ready else "heartbeat", look)

    def _submit(
        self, kind: str, look: Look | None, arrived: Arrived | None = None, question: str | None = None
    ) -> None:
        arrived = self._arrived if arrived is None else arrived
        assert arrived is not None
        request = self._request(arrived.frame.pixels, question)
        handle = self._engine.submit(request, on_change=lambda _: self._bell.set())
        self._answer = _Answer(handle, arrived, look, kind, question)

    def _cancel(self) -> None:
        """Ends the answer on its way; what was told of it stays told."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.handle.cancel()

    # Telling

    def _tell(self) -> None:
        answer = self._answer
        if answer is None:
            return
        pieces, done = answer.handle.since(len(answer.pieces))
        for piece in pieces:
            answer.pieces.append(piece)
            answer.waiting += answer.sentences.add(piece.text)
        if done and not answer.ended:
            answer.ended = True
            if answer.handle.error is not None:
                self._answer = None
                if not isinstance(answer.handle.error, CancelledError):
                    raise answer.handle.error
                return
            answer.waiting += answer.sentences.finish()
        if self._is_doubtful(answer):
            return
        while answer.waiting:
            self._tell_sentence(answer, answer.waiting.popleft())
        if answer.ended:
            self._finish(answer)

    def _is_doubtful(self, answer: _Answer) -> bool:
        """Whether the picture is changing, so that it is not known whether the answer still holds."""
        look = self._look
        if answer.by_person or look is None or not look.changed:
            return False
        return not look.ready or look.settled

    def _tell_sentence(self, answer: _Answer, raw: str) -> None:
        if says_nothing(raw):
            return
        text = raw if answer.question is not None else self._clean(raw)
        answer.all.append(text)
        if not answer.by_person and any(same(text, known) for known in self._known):
            return
        now = time.monotonic()
        first = not answer.told
        if first:
            answer.age = now - answer.arrived.moment
        answer.told.append(text)
        self._silent = None
        urgent = answer.by_person or (answer.look is not None and answer.look.settled and answer.look.cut)
        self._audience.sentence(Told(text=text, first=first, again=answer.by_person, urgent=first and urgent))

    def _finish(self, answer: _Answer) -> None:
        """Takes note of an answer that has been told."""
        self._answer = None
        if answer.question is None and answer.all:
            self._known = answer.all
            text = " ".join(answer.all)
            if self._cue is None or self._cue[1] != text:
                self._end_cue(self._now())
                self._cue = self._now(), text
            self._cue_stood = answer.look is None or answer.look.settled
        self._audience.description(
            Description(
                time=answer.arrived.frame.time,
                text=" ".join(answer.told or answer.all),
                kind=answer.kind,
                question=answer.question,
                shown=bool(answer.told),
                change=0.0 if answer.look is None else answer.look.change,
                age=answer.age,
                result=whole(answer.pieces),
                frames=self._newest.count,
                dropped=self._newest.dropped,
            )
        )

    # What a person wants

    def _obey(self, what: str, question: str | None) -> None:
        match what:
            case "now" if self._arrived is not None and self._look is not None:
                self._cancel()
                self._scenes.accept(self._look)
                self._asked = time.monotonic()
                self._submit("now", self._look)
            case "repeat":
                self._repeat()
            case "pause":
                self._cancel()
                self._is_paused = not self._is_paused
                self._audience.gone()
                self._audience.note("paused; p goes on" if self._is_paused else "watching again")
            case "hold":
                self._cancel()
                self._held = self._arrived
                self._audience.gone()
            case "ask":
                held, self._held = self._held, None
                if question and held is not None:
                    self._submit("question", None, held, question)
            case "leave":
                self._is_left = True

    def _repeat(self) -> None:
        if not self._known:
            self._audience.note("nothing has been described yet")
        for number, text in enumerate(self._known):
            self._audience.sentence(Told(text=text, first=not number, again=True, urgent=not number))
