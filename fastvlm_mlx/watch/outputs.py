"""What is told, as text, JSON lines or subtitles; the log; and the command that is run at every change."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.outputs import check_output, json_line
from fastvlm_mlx.schema import parse_object

FORMATS = ("text", "jsonl", "srt", "vtt")
_JOIN = 0.5
"""Seconds between two cues of the same text that make one cue."""
HOOK_SECONDS = 60.0
"""That a command may take which is run at a change."""
_MOST_LATE = 3
_SHORTEST = 0.2
"""Seconds of a cue; what was there for less cannot be read."""


@dataclass(frozen=True)
class Cue:
    """A text and the time, in seconds, in which what it says can be seen."""

    start: float
    end: float
    text: str


class Joined:
    """Cues in which one text is not told twice in a row, and none is too short to be read or without a text.

    Args:
        write: Takes each when it is complete.
    """

    def __init__(self, write: Callable[[Cue], None]) -> None:
        self._write = write
        self._last: Cue | None = None

    def add(self, cue: Cue) -> None:
        """Adds the next one."""
        last = self._last
        if cue.end - cue.start < _SHORTEST or not cue.text:
            return
        if last is not None and cue.text == last.text and cue.start - last.end <= _JOIN:
            self._last = Cue(last.start, max(cue.end, last.end), last.text)
            return
        self.finish()
        self._last = cue

    def finish(self) -> None:
        """Writes the last one."""
        last, self._last = self._last, None
        if last is not None:
            self._write(last)


def clock(seconds: float, separator: str) -> str:
    """A time as subtitles have it: `01:02:03,450` with a comma, as `separator` says."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{separator}{rest % 1000:03}"


def short_clock(seconds: float) -> str:
    """A time as people write it: `2:03`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Subtitles:
    """Writes cues as SubRip or WebVTT.

    Args:
        write: Takes text; called once for each cue, so that a file is whole whenever the program ends.
        vtt: Whether to write WebVTT.
    """

    def __init__(self, write: Callable[[str], None], *, vtt: bool) -> None:
        self._write = write
        self._vtt = vtt
        self._number = 0
        if vtt:
            write("WEBVTT\n\n")

    def cue(self, cue: Cue) -> None:
        """Writes one."""
        self._number += 1
        separator = "." if self._vtt else ","
        lines = [line.strip() for line in cue.text.splitlines() if line.strip()]
        text = "\n".join(lines).replace("-->", "->")
        if self._vtt:
            text = text.replace("&", "&amp;").replace("<", "&lt;")
        times = f"{clock(cue.start, separator)} --> {clock(cue.end, separator)}"
        self._write(f"{self._number}\n{times}\n{text}\n\n")


class Log:
    """A file of JSON lines that is whole whenever the program ends; what it holds already stays.

    Args:
        path: Of the file.

    Raises:
        ConfigError: If it cannot be written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        check_output(path)
        self._check()
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise self._refusal(err) from err
        if self._cut:
            self._append(b"\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a line, in one piece.

        Raises:
            ConfigError: If it cannot be written.
        """
        self._append(json_line(record))

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as err:
            raise self._refusal(err) from err

    def _refusal(self, err: OSError) -> ConfigError:
        return ConfigError(f"{printable(self._path)}: cannot be written ({err.strerror or err})")

    def _check(self) -> None:
        """Looks whether the file is a log, and whether its last line was cut off."""
        self._cut = False
        if not self._path.is_file() or not self._path.stat().st_size:
            return
        with self._path.open("rb") as file:
            first = file.readline(1_000_000)
            file.seek(-1, os.SEEK_END)
            self._cut = file.read(1) != b"\n"
        label = printable(self._path)
        with suppress(FastVLMError):
            if "text" in parse_object(first, label):
                return
        raise ConfigError(f"{label}: is not a log of fastvlm watch, and nothing was written; give a new file")


class Hook:
    """A user's command, run whenever something new is told.

    The text is its standard input and FASTVLM_TEXT in its environment; no shell sees it. One runs at a time; what is
    told meanwhile waits, and only the newest of it. One that does not end in time is ended, with all that it has
    started; after three in a row, none is run any more.

    Args:
        command: Words as a shell divides them.
        notify: Is told once if the command fails, if it does not end in time, and if it is given up.
        limit: Seconds that it may take.

    Raises:
        ConfigError: If there is no such program.
    """

    def __init__(self, command: str, notify: Callable[[str], None], *, limit: float = HOOK_SECONDS) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as err:
            raise ConfigError(f"the command {printable(command, 100)} cannot be read ({err})") from err
        if not self._words or shutil.which(os.path.expanduser(self._words[0])) is None:
            name = printable(self._words[0] if self._words else command, 100)
            raise ConfigError(f"{name}: there is no such program to run at a change; check the name and $PATH")
        self._words[0] = os.path.expanduser(self._words[0])
        self._notify = notify
        self._limit = limit
        self._late = 0
        self._waiting: tuple[str, dict[str, str]] | None = None
        self._changed = threading.Condition()
        self._failed = self._finished = False
        self._thread = threading.Thread(target=self._run, name="fastvlm-on-change", daemon=True)
        self._thread.start()

    def run(self, text: str, values: Mapping[str, str], *, each: bool = False) -> None:
        """Runs the command, at once or when the one before has ended.

        Args:
            text: What is told.
            values: More for its environment.
            each: Whether to wait until it runs rather than let a newer text take the place of one that waits.
        """
        environment = {**os.environ, **values, "FASTVLM_TEXT": text.replace("\0", "")}
        with self._changed:
            if each:
                self._changed.wait_for(lambda: self._waiting is None)
            if self._late >= _MOST_LATE or self._finished:
                return
            self._waiting = text, environment
            self._changed.notify_all()

    def finish(self, timeout: float) -> bool:
        """Runs what waits, and nothing that comes later; returns whether that has ended within `timeout` seconds."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._finished)
                if self._waiting is None:
                    return
                (text, environment), self._waiting = self._waiting, None
                self._changed.notify_all()
            try:
                problem = self._execute(text, environment)
                self._late = 0
            except subprocess.TimeoutExpired:
                problem = f"has not ended within {self._limit:g} s, and was ended"
                self._late += 1
            name = f"--on-change: {printable(self._words[0], 100)}"
            if problem and not self._failed:
                self._failed = True
                self._notify(f"{name} {problem}")
            if self._late == _MOST_LATE:
                with self._changed:
                    self._waiting = None
                    self._changed.notify_all()
                self._notify(f"{name} has not ended in time {_MOST_LATE} times in a row; it is not run any more")

    def _execute(self, text: str, environment: dict[str, str]) -> str:
        """Runs the command to its end; returns what went wrong.

        Raises:
            TimeoutExpired: If it took too long, and was ended.
        """
        try:
            process = subprocess.Popen(self._words, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        except OSError as err:
            return f"cannot be run ({err.strerror or err})"
        with process:
            try:
                process.communicate(text.encode(), self._limit)
            except subprocess.TimeoutExpired:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return f"ended with exit code {process.returncode}" if process.returncode else ""
