"""A camera or screen by the clock: what it shows is told as soon as it has changed, and only while it is there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.generation.result import whole
from fastvlm_mlx.watch.answer import Answer
from fastvlm_mlx.watch.audience import Audience, Description, Told
from fastvlm_mlx.watch.changes import LEAST_CHANGE, Look, Scenes, is_dark, sign
from fastvlm_mlx.watch.newest import Arrived, Freshness, Newest
from fastvlm_mlx.watch.outputs import Cue
from fastvlm_mlx.watch.sentences import same, says_nothing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.generation.request import Request

_STARVED = 8.0
"""Seconds without a word after which it is said that scenes follow one another faster than answers come."""
_AGAIN = 60.0
"""Seconds after which that may be said again."""
_OLDEST = 3.0
"""Seconds that a description of a picture that moves may be old; what stands still is looked at again instead."""
_SHORT = 0.2
"""Seconds that a scene lasts, at most, beyond the last look that showed it."""
_TICK = 0.25
"""Seconds after which the loop looks around without being called: for the heartbeat."""


class Live:
    """Watches a stream: only its newest frame counts.

    The model is asked when the picture has changed and stands still, and about a picture that moves all the time,
    every `every` seconds. What is on its way is cancelled as soon as another picture is there. A sentence waits while
    the picture changes, and for a frame that has only just come, so that nothing is told of what is gone, however slow
    the machine is. Something small that changes again and again, such as a clock, does not cancel two answers in a row.
    Only the engine's thread uses the model.

    Args:
        newest: The frames.
        engine: Answers one request at a time.
        request: The request for a picture, and for a question of a person's if there is one.
        clean: Makes a sentence what is told.
        audience: Who is told.
        every: Seconds between two pictures that the model is asked about, at least.
        heartbeat: Seconds after which it is asked though nothing seems to have changed; 0 for never.
        least: See `Scenes`.

    Attributes:
        outdated: Answers that were not told, or not to their end, since what they were about was gone.
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
        self.outdated = 0
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
        self._answer: Answer | None = None
        self._known: list[str] = []
        self._cue: tuple[float, list[str]] | None = None
        self._cue_stood = True
        self._held: Arrived | None = None
        self._asked = 0.0
        self._seen = 0.0
        self._freshness = Freshness()
        self._is_wanted = False
        self._silent: float | None = None
        self._spares = False
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

    def run(self) -> bool:
        """Watches until the stream ends or somebody leaves; returns whether it was the stream.

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
                    return True
            return False
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
        if not look.changed:
            self._seen = look.time
            if look.settled:
                self._cue_stood = True
                if self._answer is not None:
                    self._answer.stood = True
        if not (look.changed and look.ready):
            return
        answer = self._answer
        if look.settled and self._cue is not None:
            self._end_cue(min(look.since, self._seen + _SHORT) if self._cue_stood else look.time)
            self._audience.gone(cut=look.cut and not self._is_wanted)
        if answer is not None and (look.settled or answer.stood) and self._contradicts(look, answer):
            self._drop(cut=look.cut)

    def _contradicts(self, look: Look, answer: Answer) -> bool:
        """Whether a picture that has changed makes an answer on its way untrue."""
        return not answer.by_person and (look.cut or not answer.is_spared)

    def _drop(self, *, cut: bool) -> None:
        """Ends an answer that is out of date."""
        self.outdated += 1
        self._cancel()
        self._spares = not cut
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
            start, sentences = self._cue
            self._cue = None
            self._audience.cue(Cue(start, max(moment, start), " ".join(sentences)))

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
        gone, _ = self._scenes.accept(look)
        if look.changed:
            self._end_cue(gone)
        self._look = look._replace(changed=False, ready=False)
        self._asked = time.monotonic()
        if is_dark(look.signature):
            self._silent = None
        else:
            self._submit("change" if look.ready else "heartbeat", look)

    def _submit(
        self, kind: str, look: Look | None, arrived: Arrived | None = None, question: str | None = None
    ) -> None:
        arrived = self._arrived if arrived is None else arrived
        assert arrived is not None
        request = self._request(arrived.frame.pixels, question)
        handle = self._engine.submit(request, on_change=lambda _: self._bell.set())
        stood = look is None or look.settled
        self._answer = Answer(handle, arrived, look, kind, stood, question, is_spared=self._spares)

    def _cancel(self) -> None:
        """Ends the answer on its way; what was told of it stays told."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.handle.cancel()
            if answer.told:
                self._record(answer)

    # Telling

    def _tell(self) -> None:
        answer = self._answer
        if answer is None:
            return
        if not answer.read():
            self._answer = None
            return
        if self._is_doubtful(answer) or not self._is_known(answer):
            return
        if answer.waiting and not answer.stood and time.monotonic() - answer.arrived.moment > _OLDEST:
            self._drop(cut=True)
            return
        while answer.waiting:
            self._tell_sentence(answer, answer.waiting.popleft())
        if answer.is_whole:
            self._answer, self._silent, self._spares = None, None, False
            self._record(answer)

    def _is_doubtful(self, answer: Answer) -> bool:
        """Whether the picture is changing, so that it is not known whether the answer still holds."""
        look = self._look
        return answer.stood and look is not None and look.changed and self._contradicts(look, answer)

    def _is_known(self, answer: Answer) -> bool:
        """Whether the newest frame has come just now, so that what it shows is there."""
        if answer.by_person or self._arrived is None or self._newest.ended:
            return True
        return self._freshness.holds(self._arrived.moment, time.monotonic())

    def _tell_sentence(self, answer: Answer, raw: str) -> None:
        if says_nothing(raw):
            return
        text = raw if answer.question is not None else self._clean(raw)
        answer.all.append(text)
        if answer.question is None and len(answer.all) == 1:
            self._end_cue(self._now())
            self._cue, self._cue_stood = (self._now(), answer.all), answer.stood
        if not answer.by_person and any(same(text, known) for known in self._known):
            return
        self._is_wanted = answer.by_person
        first = not answer.told
        if first:
            answer.age = time.monotonic() - answer.arrived.moment
        answer.told.append(text)
        urgent = first and (answer.by_person or answer.is_of_new_scene)
        self._audience.sentence(Told(text=text, first=first, again=answer.by_person, urgent=urgent))

    def _record(self, answer: Answer) -> None:
        """Takes note of an answer that has been told."""
        if answer.question is None and answer.all:
            self._known = answer.all
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
                outdated=self.outdated,
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
                self._end_cue(self._now())
                self._audience.gone(cut=False)
                self._audience.note("paused; p goes on" if self._is_paused else "watching again")
            case "hold":
                self._cancel()
                self._held = self._arrived
                self._audience.gone(cut=False)
            case "ask":
                held, self._held = self._held, None
                if question and held is not None:
                    self._submit("question", None, held, question)
            case "leave":
                self._is_left = True

    def _repeat(self) -> None:
        if not self._known:
            self._audience.note("nothing has been described yet")
        self._is_wanted = True
        for number, text in enumerate(self._known):
            self._audience.sentence(Told(text=text, first=not number, again=True, urgent=not number))
