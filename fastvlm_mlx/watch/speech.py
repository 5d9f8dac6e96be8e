"""Speech by the programs that systems have for it: one sentence after the other, and the newest wins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fastvlm_mlx.watch.sentences import same

PROGRAMS = ("say", "spd-say", "espeak-ng")
_AUTO = ("say",) if sys.platform == "darwin" else ("spd-say", "espeak-ng")
_SLOW, _USUAL, _FAST = 80, 175, 390
"""Words a minute, which spd-say calls -100, 0 and 100."""
_PATIENCE = 10.0
"""Seconds that a program may take beyond what a sentence takes."""
_MOST_FAILURES = 3
_LONGEST = 1000
"""Characters of a sentence that are spoken; more is no sentence."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How to speak.

    Attributes:
        program: One of `PROGRAMS`.
        path: Where it is.
        name: Of the voice, as the program calls it; None for its own.
        rate: Words a minute; None for the program's own.
    """

    program: str
    path: str
    name: str | None = None
    rate: int | None = None

    def command(self, sentence: str) -> tuple[list[str], str]:
        """What speaks a sentence: the arguments of a program, and what it reads. No shell sees the sentence."""
        flags = {"say": ("-v", "-r"), "espeak-ng": ("-v", "-s"), "spd-say": ("-y", "-r")}[self.program]
        rate = _spd_rate(self.rate) if self.program == "spd-say" and self.rate else self.rate
        options = [
            word
            for flag, value in zip(flags, (self.name, rate), strict=True)
            if value is not None
            for word in (flag, str(value))
        ]
        if self.program == "spd-say":
            return [self.path, "--wait", *options, "--", sentence], ""
        return [self.path, *options, *(("-f", "-") if self.program == "say" else ("--stdin",))], sentence

    @property
    def silence(self) -> list[str] | None:
        """What ends speech that goes on when the program is killed; None if none does."""
        return [self.path, "--cancel"] if self.program == "spd-say" else None


def _spd_rate(words: int) -> int:
    """Words a minute as a number from -100 to 100."""
    span = _FAST - _USUAL if words > _USUAL else _USUAL - _SLOW
    return max(-100, min(100, round(100 * (words - _USUAL) / span)))


def find_voice(program: str, name: str | None = None, rate: int | None = None) -> Voice | None:
    """The voice of a program; of `auto`, of the first one that this machine has. None if there is none."""
    for each in _AUTO if program == "auto" else (program,):
        if path := shutil.which(each):
            return Voice(program=each, path=path, name=name, rate=rate)
    return None


class Speaker:
    """Speaks in a thread of its own.

    What waits to be spoken is always of one description, the newest. A sentence that says the same as the one before
    is not spoken. A program that fails or hangs is ended, and given up after three times in a row.

    Args:
        voice: How to speak.
        notify: Is told once what is wrong with the program.
        patience: Seconds that the program may take beyond what a sentence takes.

    Attributes:
        works: Whether the program has not been given up.
    """

    def __init__(self, voice: Voice, notify: Callable[[str], None], *, patience: float = _PATIENCE) -> None:
        self.works = True
        self._voice = voice
        self._notify = notify
        self._patience = patience
        self._waiting: deque[tuple[str, bool]] = deque()
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._last = ""
        self._busy = False
        self._interrupted = False
        self._closed = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="fastvlm-speech", daemon=True)
        self._thread.start()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, sentence: str, *, again: bool = False) -> None:
        """Speaks a sentence after those that wait.

        Args:
            sentence: A whole one.
            again: Whether to speak it even if it says the same as the one before.
        """
        with self._changed:
            if self.works and not self._closed:
                self._waiting.append((sentence, again))
                self._changed.notify_all()

    def forget(self) -> None:
        """Drops what waits; the sentence that is being spoken goes on."""
        with self._changed:
            self._waiting.clear()

    def interrupt(self) -> None:
        """Drops what waits, and ends the sentence that is being spoken."""
        with self._changed:
            self._waiting.clear()
            if self._busy:
                self._interrupted = True
                _end(self._process)

    def wait(self, timeout: float) -> bool:
        """Whether all has been spoken, after waiting for that, at most `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """Falls silent at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.interrupt()
        self._thread.join(1)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                sentence, again = self._waiting.popleft()
                if not again and same(sentence, self._last):
                    continue
                self._last, self._busy, self._interrupted = sentence, True, False
            problem = self._speak(sentence[:_LONGEST])
            if self._interrupted:
                if self._voice.silence is not None:
                    _run_quietly(self._voice.silence)
            elif problem:
                self._fail(problem)
            else:
                self._failures = 0

    def _speak(self, sentence: str) -> str:
        """Speaks a sentence to its end; returns what went wrong."""
        command, text = self._voice.command(sentence)
        limit = self._patience + 60 / (self._voice.rate or _SLOW) * (len(sentence) / 2)
        try:
            with self._changed:  # so that no interruption comes between
                if self._interrupted:
                    return ""
                self._process = process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # an interrupt at the terminal is for this program
                )
            try:
                process.communicate(text, timeout=limit)
            except subprocess.TimeoutExpired:
                return f"has not ended after {limit:.0f} s"
            finally:
                _end(process)
                if process.stdin is not None:
                    with suppress(OSError):
                        process.stdin.close()
        except OSError as err:
            return f"cannot be run ({err.strerror or err})"
        return f"ended with exit code {process.returncode}" if process.returncode else ""

    def _fail(self, problem: str) -> None:
        """Counts a failure, and gives up after some."""
        self._failures += 1
        if self._failures == 1:
            self._notify(f"{self._voice.program} {problem}; the sentence was not spoken")
        if self._failures == _MOST_FAILURES:
            self._notify(
                f"{self._voice.program} has failed {_MOST_FAILURES} times; descriptions are only shown from now"
            )
            with self._changed:
                self.works = False
                self._waiting.clear()


def _end(process: subprocess.Popen[str] | None) -> None:
    """Ends a program and what it has started, if it runs."""
    if process is None or process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return


def _run_quietly(command: list[str]) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=1
        )
