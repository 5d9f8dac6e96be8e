"""An answer on its way: its sentences as they come, and which of them were told."""

from __future__ import annotations

from collections import deque
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.watch.changes import Look
from fastvlm_mlx.watch.newest import Arrived
from fastvlm_mlx.watch.sentences import Sentences

if TYPE_CHECKING:
    from fastvlm_mlx.generation.request import Handle


@dataclass
class Answer:
    """An answer about one frame.

    Attributes:
        handle: Of the engine.
        arrived: The frame.
        look: What the look at it gave; None if a person asks about an earlier one.
        kind: Why it was asked: `change`, `heartbeat`, `now` or `question`.
        stood: Whether its picture stood still, or has done so since.
        question: That of a person.
        is_spared: Whether a small change lets it end, since the one before it was cancelled for one.
        pieces: Those that have come.
        waiting: Sentences that are whole, and have yet to be told.
        all: Sentences that say something, as they are told.
        told: Those of them that were told.
        age: Seconds from the frame's arrival to the first of them.
        is_whole: Whether nothing more comes.
    """

    handle: Handle
    arrived: Arrived
    look: Look | None
    kind: str
    stood: bool
    question: str | None = None
    is_spared: bool = False
    pieces: list[GenerationResult] = field(default_factory=list)
    waiting: deque[str] = field(default_factory=deque)
    all: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    age: float = 0.0
    is_whole: bool = False
    _sentences: Sentences = field(default_factory=Sentences)

    @property
    def by_person(self) -> bool:
        """Whether a person asked for it, who gets it whatever it says."""
        return self.kind in ("now", "question")

    @property
    def is_of_new_scene(self) -> bool:
        """Whether another scene came with its picture."""
        return self.look is not None and self.look.settled and self.look.cut

    def read(self) -> bool:
        """Takes in what has come; returns False if it was cancelled.

        Raises:
            FastVLMError: If it has failed.
        """
        pieces, done = self.handle.since(len(self.pieces))
        for piece in pieces:
            self.pieces.append(piece)
            self.waiting += self._sentences.add(piece.text)
        if done and not self.is_whole:
            self.is_whole = True
            if self.handle.error is not None:
                if isinstance(self.handle.error, CancelledError):
                    return False
                raise self.handle.error
            self.waiting += self._sentences.finish()
        return True
