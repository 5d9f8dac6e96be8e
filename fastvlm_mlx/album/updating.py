"""Brings the index of an album up to date: looks at what has changed, and shows the model what is new.

The vision tower sees a new picture once, for its visual tokens and for what is asked about it. Each picture is kept as
soon as it is done, so whatever ends this early loses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.album.album import Album
from fastvlm_mlx.album.captions import JOURNAL, Texts
from fastvlm_mlx.album.encoder import Encoder
from fastvlm_mlx.album.index import Index
from fastvlm_mlx.album.plan import Plan, look
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.jobs.asking import Asking, Record, Work
from fastvlm_mlx.jobs.captions import exif_values
from fastvlm_mlx.jobs.files import stat_of
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.task import CAPTION, Task


def form_of(weights: str, resolution: int, background: str | None = None) -> str:
    """What visual tokens depend on besides the picture.

    Args:
        weights: The `checkpoint_fingerprint` of the model.
        resolution: Side in pixels.
        background: Colour under transparent pixels.
    """
    return " ".join(filter(None, (weights, str(resolution), background)))


def default_resolution(native: int) -> int:
    """The resolution of an index: the model's own, but not more than 512.

    An index at 1024 px takes four times the room, and asking takes three times as long.
    """
    return min(native, 512)


class Step(NamedTuple):
    """A picture that is done.

    Attributes:
        name: Its path below the album's folder.
        error: Why it could not be read; None if it could.
        shown: Whether the model has seen it; otherwise its content was known.
    """

    name: str
    error: str | None
    shown: bool


class Updating:
    """Brings an album's index up to date.

    Args:
        album: The album.
        task: What is asked about each picture, with a resolution; no questions for visual tokens alone.
        texts: What is known from elsewhere; it is not asked about.
        retry_errors: Whether to look again at pictures that could not be read and have not changed.
    """

    def __init__(self, album: Album, task: Task, texts: Texts | None = None, *, retry_errors: bool = False) -> None:
        if not isinstance(task.resolution, int):
            raise ConfigError("all pictures of an index have one resolution in pixels")
        self._album = album
        self._index = album.index
        self._task = task
        self._resolution = task.resolution
        self._texts = texts or {}
        self._retry_errors = retry_errors
        self.form = form_of(task.weights, task.resolution, task.background)

    def plan(self) -> Plan:
        """Looks at the folder."""
        self._take_in_texts()
        return look(self._album, self._complete(), retry_errors=self._retry_errors)

    def _complete(self) -> set[int]:
        """The contents about which the index knows all that it should."""
        return self._index.described(self.form, list(self._task.questions), (self._task.weights, JOURNAL))

    def _take_in_texts(self) -> None:
        """Keeps what is known from elsewhere about contents that the index has."""
        for sha256, said in self._texts.items():
            content = self._index.content(sha256)
            if content is not None and not said.items() <= self._index.texts(content).items():
                with self._index.changing():
                    self._index.keep_texts(content, said, JOURNAL)

    def run(self, plan: Plan, engine: Callable[[], Engine]) -> Iterator[Step]:
        """Does what a plan says; yields each picture of it when that is kept.

        Args:
            plan: From `plan`.
            engine: Returns the engine; called when the model has to see a picture.
        """
        if plan.vanished:
            return
        self._index.set_gone([each.id for each in plan.gone], [each.id for each in plan.back])
        asking = Asking(self._task)
        complete = self._complete()
        queue: deque[_Job] = deque()
        with ExitStack() as stack:
            encoder = Encoder(stack, self._task, self._resolution)
            try:
                for picture in plan.todo:
                    queue.append(self._begin(picture, asking, complete, encoder, engine))
                    while queue and (queue[0].is_ready or len(queue) > encoder.ahead):
                        yield self._finish(queue, asking, complete, encoder, engine)
                encoder.flush()
                while queue:
                    yield self._finish(queue, asking, complete, encoder, engine)
            finally:
                for job in queue:
                    job.work.cancel()

    def _begin(
        self,
        picture: Picture,
        asking: Asking,
        complete: set[int],
        encoder: Encoder,
        engine: Callable[[], Engine],
    ) -> _Job:
        """Reads a picture, and shows it to the model unless its content is known."""
        job = _Job(work=asking.look(picture.name, picture.path))
        work = job.work
        if work.error is not None or work.sha256 is None:
            return job
        if self._index.content(work.sha256) in complete or work.sha256 in encoder.seen:
            return job
        encoder.seen.add(work.sha256)
        self._show(job, asking, encoder, engine)
        return job

    def _show(self, job: _Job, asking: Asking, encoder: Encoder, engine: Callable[[], Engine]) -> None:
        job.shown = True
        said = self._texts.get(job.work.sha256 or "", {})
        if all(name in said for name in self._task.questions):
            job.tokens = encoder.add(engine(), job.work.place)
        else:
            asking.ask(_Keeping(engine()), job.work)

    def _finish(
        self,
        queue: deque[_Job],
        asking: Asking,
        complete: set[int],
        encoder: Encoder,
        engine: Callable[[], Engine],
    ) -> Step:
        """Keeps what was found about the first picture of a queue, and takes it out."""
        job, work = queue[0], queue[0].work
        content = None if work.sha256 is None else self._index.content(work.sha256)
        if work.error is None and not job.shown and content not in complete:
            self._show(job, asking, encoder, engine)  # the picture with this content has failed
        outcome: Record = {}
        tokens: NDArray[np.float32] | None = None
        if job.shown:
            outcome = asking.outcome(work) if work.handles else {}
            if "error" not in outcome:
                tokens, outcome = self._tokens(job, encoder, engine, outcome)
        elif work.error is not None:
            outcome = asking.outcome(work)
        error = outcome["error"]["message"] if "error" in outcome else None
        self._keep(job, tokens, outcome, error)
        if error is None and job.shown and work.sha256 is not None:
            complete.add(self._index.content(work.sha256) or 0)
        queue.popleft()
        return Step(work.name, error, job.shown)

    def _tokens(
        self, job: _Job, encoder: Encoder, engine: Callable[[], Engine], outcome: Record
    ) -> tuple[NDArray[np.float32] | None, Record]:
        """The visual tokens (N, D) of a picture, or an outcome that says why there are none."""
        kept = [handle.visual_tokens for handle in job.work.handles.values() if handle.visual_tokens is not None]
        if kept:
            return kept[0][0], outcome
        pending = job.tokens or encoder.add(engine(), job.work.place)
        try:
            if not pending.done():
                encoder.flush()
            tokens = pending.result()
            if stat_of(job.work.place) != job.work.stat:
                raise ImageError(f"{printable(job.work.place)}: changed while it was read; run the command again")
        except FastVLMError as err:
            return None, {"error": {"type": type(err).__name__, "message": str(err)}}
        return tokens, outcome

    def _keep(self, job: _Job, tokens: NDArray[np.float32] | None, outcome: Record, error: str | None) -> None:
        work, index = job.work, self._index
        modified = work.stat[1] / 1e9 if len(work.stat) > 1 else 0.0
        with index.changing():
            content = None
            if error is None and work.sha256 is not None:
                content = index.content(work.sha256)
                if content is None:
                    content = index.add_content(work.sha256, work.size, _taken(work))
                if tokens is not None:
                    index.keep_tokens(content, self.form, tokens)
            index.keep_picture(work.name, work.stat, modified, content, error)
            if content is not None:
                answers = {CAPTION: outcome[CAPTION]} if CAPTION in outcome else {}
                index.keep_texts(content, answers | outcome.get("answers", {}), self._task.weights)
                if said := self._texts.get(work.sha256 or ""):
                    index.keep_texts(content, said, JOURNAL)


def _taken(work: Work) -> str:
    """The day on which a picture was taken."""
    try:
        return exif_values(Path(work.place).read_bytes()).get("date", "")
    except (OSError, ValueError):
        return ""


@dataclass(kw_only=True, eq=False)
class _Job:
    """A picture on its way.

    Attributes:
        work: What is asked about it.
        tokens: Its visual tokens, if nothing is asked about it.
        shown: Whether the model sees it.
    """

    work: Work
    tokens: Future[NDArray[np.float32]] | None = None
    shown: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return self.work.is_ready and (self.tokens is None or self.tokens.done())


class _Keeping:
    """An engine whose handles get the visual tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.processor = engine.processor

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room."""
        return self._engine.submit(replace(request, keep_visual_tokens=True))


def known_pictures(index: Index) -> int:
    """How many pictures an index has that were there at the last look."""
    return sum(picture.gone is None and picture.content is not None for picture in index.pictures())
