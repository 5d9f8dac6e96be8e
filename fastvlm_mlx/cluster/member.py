"""A worker as the driver sees it: what it takes at a time, and the calls that it has not answered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fastvlm_mlx.cluster.nodes import CALLS
from fastvlm_mlx.cluster.worker import Asked, Place
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.inputs.sources import read

SUSPECT = 2
"""Workers that have to end before a question is asked of one that has nothing else, so that it alone is to blame."""


@dataclass(eq=False)
class Job:
    """A question on its way: whom it was asked, and how many ended over it."""

    handle: Handle
    deaths: int = 0
    holders: set[Member] = field(default_factory=set)


@dataclass(eq=False)
class Call:
    """Questions that a worker was asked together, and when."""

    jobs: list[Job]
    since: float


@dataclass(eq=False)
class Member:
    """A worker: how many questions it takes, and what it is busy with.

    Attributes:
        actor: Ray's handle.
        calls: That it takes at a time; 0 until it is ready.
        size: Questions in a call.
        open: What it was asked and has not answered.
        sees_files: Whether it reads pictures itself.
        heard: When it last said something.
        silent: Whether it is left out until it answers again.
        gone: Why it will never answer.
    """

    actor: Any
    calls: int = 0
    size: int = 1
    open: set[Call] = field(default_factory=set)
    sees_files: bool = True
    heard: float = 0.0
    silent: bool = False
    gone: str = ""

    @property
    def room(self) -> int:
        """How many more calls it takes."""
        is_tested = any(job.deaths >= SUSPECT for call in self.open for job in call.jobs)
        return 0 if self.silent or is_tested else self.calls - len(self.open)

    def take(self, at_a_time: int) -> None:
        """Lets it be asked, as it answers so many questions at a time: those, and as many behind them.

        Few large calls cost Ray less than many small ones; and while one is on its way, the others keep it busy.
        """
        self.calls = min(CALLS, at_a_time + 2)
        self.size = max(1, 2 * at_a_time // CALLS)


def asked_of(request: Request, sees_files: bool) -> Asked:
    """A request as it is sent: with the place of its picture if a worker reads that, or with its bytes.

    Raises:
        ImageError: If it cannot be read.
    """
    source: Any = request.image[0] if isinstance(request.image, list) else request.image
    if not isinstance(source, str) or "://" in source:
        return Asked(request, None)
    place = Place.of(source) if sees_files else None
    if place is not None:
        return Asked(replace(request, image=None), place)
    sent: list[Any] = [read(source)]
    return Asked(replace(request, image=sent), None)
