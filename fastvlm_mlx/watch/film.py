"""A film by its own time: what each of its scenes shows, and from when to when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.inputs.frames import Frame, Stream
from fastvlm_mlx.watch.changes import LEAST_CHANGE, Look, Scenes, is_dark, sign
from fastvlm_mlx.watch.outputs import Cue, Joined
from fastvlm_mlx.watch.sentences import told

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.generation.request import Handle, Request

LOOKS = 10.0
"""Looks at a film for each of its seconds; a cut is known as exactly."""
_AHEAD = 2
"""Scenes that wait for their answers, for each that the engine answers at the same time."""


@dataclass
class _Scene:
    """A part of the film, from when to when it lasts, and the answer about it; none about a black picture."""

    start: float
    handle: Handle | None
    end: float | None = None


class Film:
    """Describes the scenes of a film.

    The picture is looked at ten times for each second. The model is asked about a scene as soon as the picture stands
    still, and again when it has changed or after `heartbeat` seconds; about a picture that never stands still, every
    `every` seconds. Several scenes are answered together.

    Args:
        stream: The film.
        engine: Answers; its model is used by no other thread.
        request: The request for a picture.
        clean: Makes a sentence what is told.
        every: Seconds of the film between two pictures that the model is asked about, at least.
        heartbeat: Seconds of the film; 0 for never.
        least: See `Scenes`.
        progress: Called with the time of each frame.

    Attributes:
        looks: Frames that were looked at.
        asked: Pictures that the model was asked about.
    """

    def __init__(
        self,
        stream: Stream,
        engine: Engine,
        request: Callable[[NDArray[Any]], Request],
        *,
        clean: Callable[[str], str],
        every: float = 0.0,
        heartbeat: float = 30.0,
        least: float = LEAST_CHANGE,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.looks = 0
        self.asked = 0
        self._stream = stream
        self._engine = engine
        self._request = request
        self._clean = clean
        self._every = every
        self._heartbeat = heartbeat
        self._progress = progress
        self._scenes = Scenes(least, patience=max(every, 1.0))
        self._open: deque[_Scene] = deque()

    def cues(self) -> Iterator[Cue]:
        """The cues in their order, each when it is complete.

        Raises:
            FastVLMError: If the film cannot be read any further; what was seen of it has been told.
        """
        whole: list[Cue] = []
        cues = Joined(whole.append)
        error: FastVLMError | None = None
        try:
            for cue in self._watched():
                cues.add(cue)
                while whole:
                    yield whole.pop()
        except FastVLMError as err:
            error = err
        finally:
            for scene in self._open:
                if scene.handle is not None:
                    scene.handle.cancel()
        cues.finish()
        yield from whole
        if error is not None:
            raise error

    def _watched(self) -> Iterator[Cue]:
        last: tuple[Frame, Look] | None = None
        accepted = spacing = 0.0
        frames = iter(self._stream)
        error: FastVLMError | None = None
        while True:
            try:
                frame = next(frames, None)
            except FastVLMError as err:  # damaged from here on
                error, frame = err, None
            if frame is None:
                break
            self.looks += 1
            look = self._scenes.look(frame.time, sign(frame.pixels))
            spacing = frame.time - last[0].time if last is not None else 0.0
            last = frame, look
            again = bool(self._heartbeat) and frame.time - accepted >= self._heartbeat
            is_due = not self._open or frame.time - accepted >= self._every
            if (look.ready and is_due) or (again and not look.changed):
                self._begin(frame, look)
                accepted, last = frame.time, (frame, look._replace(changed=False))
            self._progress(frame.time)
            yield from self._ready(self._engine.max_batch * _AHEAD)
        if last is not None:
            frame, look = last
            if look.changed:
                self._begin(frame, look)
            self._open[-1].end = frame.time + spacing
        yield from self._ready(0)
        if error is not None:
            raise error

    def _begin(self, frame: Frame, look: Look) -> None:
        """Ends the scene before, and asks about the one that the frame is of."""
        gone, came = self._scenes.accept(look)
        if self._open:
            self._open[-1].end = gone
        handle = None
        if not is_dark(look.signature):
            handle = self._engine.submit(self._request(frame.pixels))
            self.asked += 1
        self._open.append(_Scene(came, handle))

    def _ready(self, most: int) -> Iterator[Cue]:
        """The cues of scenes that have ended; waits for answers while more than `most` scenes are open."""
        while self._open and (end := self._open[0].end) is not None:
            scene = self._open[0]
            if scene.handle is not None and not scene.handle.done and len(self._open) <= most:
                return
            text = ""
            if scene.handle is not None:
                text = " ".join(told(scene.handle.result().text, self._clean))
            self._open.popleft()
            yield Cue(scene.start, end, text)
