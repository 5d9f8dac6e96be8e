"""Asks the background server many questions at once, as an `Engine` of this process would be asked."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from contextlib import closing
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult, whole
from fastvlm_mlx.inputs.sources import read
from fastvlm_mlx.warm.client import OF_THE_QUESTION, Silent, Warm
from fastvlm_mlx.warm.wire import Question


class WarmEngine:
    """Has a background server answer requests about one picture each, which is a path or bytes.

    What a request fails for here and there is the error of its handle. For everything else, such as the server's end,
    the handle ends as if it were cancelled: somebody else may be able to answer it.

    Args:
        server: The background server.
        max_batch: The most requests on their way to it; None for what it answers at the same time, and never more.
        schema: The schema of requests that have one, as the user has given it.

    Attributes:
        processor: None, since the server prepares pictures.
    """

    processor = None

    def __init__(self, server: Warm, *, max_batch: int | None = None, schema: Any = None) -> None:
        self._server = server
        self._schema = schema
        self._room = threading.Semaphore(min(max_batch or server.max_batch, server.max_batch))
        self._open: set[Handle] = set()

    def __enter__(self) -> WarmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels what is not done. A thread that waits for a server that says nothing ends with the process."""
        for handle in list(self._open):
            handle.cancel()

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room."""
        self._room.acquire()
        handle = Handle(request)
        self._open.add(handle)
        threading.Thread(target=self._answer, args=[handle], name="fastvlm-ask", daemon=True).start()
        return handle

    def _answer(self, handle: Handle) -> None:
        """Asks the server for the answer to a request, and ends its handle."""
        error: BaseException | None = CancelledError()
        try:
            handle.add([self._ask(handle)])
            error = None
        except (*OF_THE_QUESTION, MemoryError) as err:
            error = err
        except (FastVLMError, CancelledError):
            pass
        finally:
            self._open.discard(handle)
            handle.end(error)
            self._room.release()

    def _ask(self, handle: Handle) -> GenerationResult:
        """The whole answer to a request.

        Raises:
            CancelledError: If it is cancelled on the way.
            FastVLMError: If there is none.
        """
        pieces = []
        with closing(self._server.ask(self._question(handle.request), Silent())) as answer:
            for piece in answer:
                if handle.cancelled:
                    raise CancelledError
                pieces.append(piece)
        return whole(pieces)

    def _question(self, request: Request) -> Question:
        image: Any = request.image
        return Question(
            images=[read(image[0] if isinstance(image, list) else image)],
            prompt=request.prompt,
            system=request.system,
            resolution=request.resolution,
            background=request.background,
            config=request.config,
            sentence=request.sentence,
            schema=None if request.schema is None else self._schema,
            prefix=request.prefix,
            max_words=request.max_words,
            removes_openings=request.opening is not None,
        )
