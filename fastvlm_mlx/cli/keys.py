"""Single keys at a terminal while something runs; the terminal is as it was before, however that ends."""

import atexit
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from fastvlm_mlx.cli.terminal import note

HELP = "keys: space describes now, r repeats, p pauses, ? asks a question, q ends"
_ORDERS = {" ": "now", "r": "repeat", "p": "pause", "q": "leave", "\x04": "leave"}


class Keys:
    """Reads keys in a thread of its own, where stdin is a terminal that this process may read.

    Args:
        order: Called for each key with what it stands for: see `Live.order`.
    """

    def __init__(self, order: Callable[[str, str | None], None]) -> None:
        self._order = order
        self._usual: list[Any] | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._stop: Any = signal.SIG_DFL
        self._wake = (-1, -1)

    @property
    def works(self) -> bool:
        """Whether keys are read."""
        return self._usual is not None

    def __enter__(self) -> "Keys":
        with suppress(OSError, ValueError, termios.error):
            self._file = sys.stdin.fileno()
            if os.isatty(self._file) and os.tcgetpgrp(self._file) == os.getpgrp():
                self._usual = termios.tcgetattr(self._file)
        if self._usual is not None:
            atexit.register(self._restore)
            self._stop = signal.signal(signal.SIGTSTP, self._suspend)
            self._wake = os.pipe()
            self._single()
            threading.Thread(target=self._read, name="fastvlm-keys", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._usual is not None:
            self._restore()
            atexit.unregister(self._restore)
            os.write(self._wake[1], b"x")
            signal.signal(signal.SIGTSTP, self._stop)

    def _single(self) -> None:
        """Lets single keys through, without showing them; the keys that interrupt and suspend still do."""
        with self._lock, suppress(termios.error):
            if not self._ended:
                tty.setcbreak(self._file, termios.TCSADRAIN)

    def _restore(self) -> None:
        with self._lock, suppress(termios.error):
            if self._usual is not None:
                termios.tcsetattr(self._file, termios.TCSADRAIN, self._usual)

    def _suspend(self, number: int, _: FrameType | None) -> None:
        """Stops the process as the terminal was found, and goes on with single keys."""
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._suspend)
        self._single()

    def _read(self) -> None:
        while (typed := self._next()) is not None:
            if typed.startswith("\x1b"):  # an arrow or a function key
                continue
            for key in typed:
                if key == "?":
                    self._ask()
                elif key.lower() in _ORDERS:
                    self._order(_ORDERS[key.lower()], None)
                elif key in "hH":
                    note(HELP)

    def _next(self) -> str | None:
        """What is typed next; None at the end."""
        try:
            ready, _, _ = select.select([self._file, self._wake[0]], [], [])
            data = os.read(self._file, 4096) if self._file in ready else b""
        except OSError:  # the terminal has gone
            data = b""
        return data.decode(errors="replace") if data and not self._ended else None

    def _ask(self) -> None:
        """Reads a question in a line, which the terminal shows."""
        self._order("hold", None)
        self._restore()
        with suppress(OSError):
            sys.stderr.write("your question: ")
            sys.stderr.flush()
        line = self._next()
        self._single()
        self._order("ask", (line or "").strip() or None)
