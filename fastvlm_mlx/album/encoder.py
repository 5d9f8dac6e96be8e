"""Shows pictures to the vision tower for their visual tokens alone."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.engine.scheduler import TOWER_PIXELS
from fastvlm_mlx.errors import FastVLMError, ImageError
from fastvlm_mlx.generation.engine import PREPARING_THREADS, Engine
from fastvlm_mlx.jobs.task import Task
from fastvlm_mlx.streams import turn


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """Pictures that the tower sees next."""

    pixels: list[Future[NDArray[np.uint8]]] = field(default_factory=list)
    tokens: list[Future[NDArray[np.float32]]] = field(default_factory=list)


class Encoder:
    """Shows pictures to the vision tower alone, several at a time; others are read and resized meanwhile.

    Attributes:
        ahead: So many pictures may be under way.
        seen: The SHA-256 of the contents that are or were under way.
    """

    def __init__(self, stack: ExitStack, task: Task, resolution: int) -> None:
        self._pool = stack.enter_context(ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="fastvlm-album"))
        self._background = task.background
        self._resolution = resolution
        self._batch = max(1, TOWER_PIXELS[device()] // resolution**2)
        self._waiting = _Waiting()
        self._engine: Engine | None = None
        self.ahead = max(64, 2 * self._batch)
        self.seen: set[str] = set()

    def add(self, engine: Engine, path: str) -> Future[NDArray[np.float32]]:
        """The visual tokens (N, D) of a picture, when enough pictures wait or after `flush`."""
        self._engine = engine
        prepare = engine.processor.prepare_images
        pixels = self._pool.submit(prepare, [path], self._resolution, background=self._background)
        tokens: Future[NDArray[np.float32]] = Future()
        self._waiting.pixels.append(pixels)
        self._waiting.tokens.append(tokens)
        if len(self._waiting.tokens) >= 2 * self._batch:
            self._encode(self._batch)
        return tokens

    def flush(self) -> None:
        """Shows what waits."""
        while self._waiting.tokens:
            self._encode(self._batch)

    def _encode(self, count: int) -> None:
        """Shows the first pictures that wait to the tower."""
        assert self._engine is not None
        pending = list(zip(self._waiting.pixels[:count], self._waiting.tokens[:count], strict=True))
        del self._waiting.pixels[:count], self._waiting.tokens[:count]
        readable = []
        for pixels, tokens in pending:
            try:
                readable.append((pixels.result(), tokens))
            except FastVLMError as err:
                tokens.set_exception(err)
            except MemoryError:
                tokens.set_exception(ImageError("there is not enough memory for this picture; reduce it"))
        if not readable:
            return
        with turn():
            encoded = self._engine.model.encode_image(np.concatenate([pixels for pixels, _ in readable]))
            values = np.array(encoded.astype(mx.float32))
        for row, (_, tokens) in zip(values, readable, strict=True):
            tokens.set_result(row)
