"""Asks the background server: whether it holds a model, and questions."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import ConfigError, ConversionError, FastVLMError, ImageError, PromptError
from fastvlm_mlx.generation.result import Choice, GenerationResult
from fastvlm_mlx.warm.place import Place, WarmError
from fastvlm_mlx.warm.wire import ASK, HELLO, PROTOCOL, STATUS, STOP, Question, Size, line, read_error, read_piece

VARIABLE = "FASTVLM_WARM"
OF_THE_QUESTION = (ConfigError, ConversionError, ImageError, PromptError)
"""Errors that a question gets from everybody; whatever else goes wrong, another one may be able to answer."""
_PATIENCE = 0.5
"""Seconds that the server has to say whether it holds a model; it takes milliseconds."""
_ASK_PATIENCE = 5.0
"""Seconds that it has to take in a question, which may be many megabytes."""
_OK = b"200"
_BLAS_VARIABLE = "FASTVLM_BLAS"


class WarmLostError(WarmError):
    """A background server that has gone in the middle of something; whoever asked can answer without it."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What is asked of a background server before anything else: does it hold this?

    Attributes:
        model: The name of a model, as on the command line.
        revision: Branch, tag or commit of a Hub id.
        dtype: The type to load the weights as.
    """

    model: str
    revision: str | None = None
    dtype: str | None = None

    def record(self) -> dict[str, Any]:
        """The question as JSON; a path is made absolute, since the server works in another folder."""
        path = os.path.expanduser(self.model)
        on_disk = bool(self.model.strip()) and self.model.lower() != "demo" and os.path.exists(path)
        return {
            "model": os.path.abspath(path) if on_disk else self.model,
            "on_disk": on_disk,
            "revision": self.revision,
            "dtype": self.dtype,
            **program(),
        }


def program() -> dict[str, Any]:
    """What has to be the same in client and server, so that answers are: the program, and what it computes with."""
    chosen = {name: value for name, value in os.environ.items() if name == _BLAS_VARIABLE or name.startswith("MLX_")}
    return {
        "protocol": PROTOCOL,
        "version": __version__,
        "package": str(Path(__file__).resolve().parent.parent),
        "environment": chosen,
    }


class Listener(Protocol):
    """Is told what happens on the way to an answer.

    Attributes:
        peak_memory: The most bytes that the process which answers has held.
    """

    peak_memory: int

    def transparent(self, name: str) -> None:
        """An image shows the colours that are stored in its transparent pixels."""

    def seen(self) -> None:
        """All images have turned out to be images."""


class Silent:
    """A listener that does nothing."""

    peak_memory = 0

    def transparent(self, name: str) -> None:
        """Does nothing."""

    def seen(self) -> None:
        """Does nothing."""


@dataclass(frozen=True, kw_only=True)
class Warm:
    """A background server that holds a model.

    Attributes:
        place: Where it listens.
        pid: Its process.
        weights: The fingerprint of the model.
        dtype: What it computes in.
        max_batch: The most questions that it answers at the same time.
        slow: What to do about its slow BLAS; empty if it has a fast one.
    """

    place: Place
    pid: int
    weights: str
    dtype: str
    max_batch: int
    slow: str

    def ask(self, question: Question, listener: Listener) -> Generator[GenerationResult, None, None]:
        """The pieces of an answer. What is left of it is cancelled when the iteration ends early.

        Args:
            question: The question, without choices.
            listener: Is told what happens on the way.

        Raises:
            FastVLMError: If the question cannot be answered.
            WarmLostError: If the server has gone or has no room.
        """
        done = False
        for record in self._records(question.encode(), listener):
            if "piece" in record:
                with _understood():
                    piece = read_piece(record["piece"])
                    listener.peak_memory = record["peak_memory"]
                done = piece.finish_reason is not None
                yield piece
        if not done:
            raise WarmLostError("the background server ended in the middle of the answer; run the command again")

    def choose(self, question: Question, listener: Listener) -> list[Choice]:
        """The choices of a question with their probabilities; arguments and errors are those of `ask`."""
        for record in self._records(question.encode(), listener):
            if "choices" in record:
                with _understood():
                    return [Choice(**choice) for choice in record["choices"]]
        raise WarmLostError("the background server gave no answer; run the command again")

    def measure(self, question: Question) -> Size:
        """The room that a question takes; errors are those of `ask`."""
        for record in self._records(question.encode(measure=True), Silent()):
            if "size" in record:
                with _understood():
                    return Size(**record["size"])
        raise WarmLostError("the background server gave no answer; run the command again")

    def _records(self, body: bytes, listener: Listener) -> Iterator[dict[str, Any]]:
        """What the server says to a question; errors are raised."""
        try:
            with _Request(self.place, ASK, body, _ASK_PATIENCE) as answer:
                if answer.status != _OK:
                    raise WarmLostError("the background server has no room for a question")
                answer.wait_for_ever()
                for text in answer.lines:
                    record = json.loads(text)
                    if "error" in record:
                        raise read_error(record["error"])
                    if "transparent" in record:
                        listener.transparent(record["transparent"])
                    if "seen" in record:
                        listener.seen()
                    yield record
        except (OSError, ValueError) as err:
            raise WarmLostError("the background server has gone; run the command again") from err


@contextmanager
def _understood() -> Iterator[None]:
    """Treats a server that speaks otherwise as one that has gone."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as err:
        raise WarmLostError("the background server speaks another language; end it with `fastvlm stop`") from err


class _Request:
    """A request over HTTP/1.0, whose answer ends with the connection."""

    def __init__(self, place: Place, path: str, body: bytes, timeout: float) -> None:
        self._connection = place.connect(timeout)
        try:
            head = f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            self._connection.settimeout(None)
            self._connection.sendall(head.encode("ascii") + body)
            self._connection.settimeout(timeout)
            self.lines = self._connection.makefile("rb")
            self.status = self._read_head(self.lines)
        except BaseException:
            self._connection.close()
            raise

    @staticmethod
    def _read_head(lines: BufferedReader) -> bytes:
        status = lines.readline(1000).split()
        while lines.readline(10_000).strip():
            pass
        return status[1] if len(status) > 1 else b""

    def wait_for_ever(self) -> None:
        """Waits for the rest however long it takes; a server that ends closes the connection."""
        self._connection.settimeout(None)

    def __enter__(self) -> _Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def find_warm(holding: Holding, place: Place | None = None) -> Warm | None:
    """The background server, if it runs and holds what is asked for; otherwise None, within milliseconds."""
    with suppress(FastVLMError):
        place = place or Place.of_user()
        record = _say(place, HELLO, holding.record())
        if record is not None and record.get("holds") is True:
            values = {name: record[name] for name in ("pid", "weights", "dtype", "max_batch", "slow")}
            return Warm(place=place, **values)
    return None


def status(place: Place) -> dict[str, Any] | None:
    """What the background server says about itself; None if none answers."""
    return _say(place, STATUS, {})


def stop(place: Place) -> bool:
    """Asks the background server to end; returns whether it was heard."""
    return _say(place, STOP, {}) is not None


def _say(place: Place, path: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """The object that the server answers with; None if it does not."""
    try:
        with _Request(place, path, line(record), _PATIENCE) as answer:
            values = json.loads(answer.lines.readline(1_000_000)) if answer.status == _OK else None
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
