"""Frames of films, cameras and screens: what every source of moving pictures gives."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastvlm_mlx.errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

MAX_RATE = 1000.0
"""The most frames a second that a stream is asked for."""


class Frame(NamedTuple):
    """One picture of a stream.

    Attributes:
        pixels: (H, W, 3), RGB, upright.
        time: Seconds: from the start of a film; since it was opened if the stream is live.
    """

    pixels: NDArray[np.uint8]
    time: float


class Stream(Protocol):
    """An open film, camera or screen; iterating yields its frames in order of time, and closing it releases it.

    Attributes:
        name: In messages.
        live: Whether frames come by the clock, and are lost unless they are taken in time.
        duration: Seconds; None if it is live or unknown.
        size: Width and height of the upright frames; those of a live stream may change.
    """

    name: str
    live: bool
    duration: float | None
    size: tuple[int, int]

    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:
        """Releases the device or file, at once and also from another thread; iterating ends then."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def optional(module: str, what: str, extra: str) -> ModuleType:
    """A module that an extra installs.

    Raises:
        ImageError: If it is not installed, or cannot be loaded; the message says what needs it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as err:
        missing = isinstance(err, ModuleNotFoundError) and (err.name or "").partition(".")[0] == package
        reason = "" if missing else f", which cannot be loaded ({err})"
        raise ImageError(
            f"{what} needs {package}{reason}; install it with: pip install 'fastvlm-mlx[{extra}]'"
        ) from err
