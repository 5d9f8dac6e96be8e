"""Pictures, frames and an engine for tests of watching; no model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.inputs.frames import Frame

Pixels = NDArray[np.uint8]
BLACK: Pixels = np.zeros((64, 64, 3), np.uint8)


def scene(seed: int) -> Pixels:
    """Coarse blocks of colour; each seed another scene."""
    blocks = np.random.default_rng(seed).integers(60, 190, (8, 8, 3), np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))


def with_spot(pixels: Pixels, left: int = 20) -> Pixels:
    """The same scene with one small thing more."""
    pixels = pixels.copy()
    pixels[20:28, left : left + 8] = (250, 20, 20)
    return pixels


def piece(text: str, finish_reason: str | None = None) -> GenerationResult:
    return GenerationResult(
        text=text,
        token_ids=(1,),
        prompt_tokens=1,
        visual_tokens=1,
        generated_tokens=1,
        finish_reason=finish_reason,
        timings=Timings(preprocess=0, ttft=0, decode=0, total=0),
    )


class FakeEngine:
    """Takes requests; answers at once if it has answers, else when a test says so."""

    max_batch = 1

    def __init__(self, answer: Callable[[Any], str] | None = None) -> None:
        self.handles: list[Handle] = []
        self._answer = answer

    def submit(self, request: Request, *, on_change: Callable[[Handle], None] | None = None) -> Handle:
        handle = Handle(request, on_change)
        self.handles.append(handle)
        if self._answer is not None:
            handle.add([piece(self._answer(request.image), "stop")])
            handle.end()
        return handle

    def say(self, text: str) -> None:
        """A piece of the newest answer."""
        self.handles[-1].add([piece(text)])

    def end(self, text: str = "", error: BaseException | None = None) -> None:
        """The last piece of the newest answer."""
        if error is None:
            self.handles[-1].add([piece(text, "stop")])
        self.handles[-1].end(error)


class FakeStream:
    """A stream of frames that are there already, ten a second."""

    name = "fake"
    size = (64, 64)

    def __init__(self, pictures: list[Pixels], *, live: bool = False, error: BaseException | None = None) -> None:
        self.live = live
        self.duration = None if live else len(pictures) / 10
        self.closed = False
        self._pictures = pictures
        self._error = error

    def __iter__(self) -> Iterator[Frame]:
        for number, pixels in enumerate(self._pictures):
            if self.closed:
                return
            yield Frame(pixels, number / 10)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
