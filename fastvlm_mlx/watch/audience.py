"""What there is to tell, and who is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastvlm_mlx.watch.outputs import Cue

if TYPE_CHECKING:
    from fastvlm_mlx.generation.result import GenerationResult


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
        outdated: Answers that were not told so far, or not to their end, since what they were about was gone.
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
    outdated: int


class Audience(Protocol):
    """Who is told; called in the thread that watches."""

    def sentence(self, told: Told) -> None:
        """A sentence, as soon as it is whole."""

    def description(self, description: Description) -> None:
        """An answer that has ended."""

    def cue(self, cue: Cue) -> None:
        """What could be seen, when it is gone."""

    def gone(self, *, cut: bool) -> None:
        """What was told last cannot be seen any more; `cut` if another scene is there instead."""

    def note(self, message: str) -> None:
        """Something about the watching itself."""
