"""Commands at a pseudo-terminal, which tests read and type at."""

import os
import pty
import select
import struct
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from tests.warm.background import COMMAND, environment


class Terminal:
    """A `fastvlm` command at a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, **variables: str) -> None:
        self.output = ""
        self._read = 0
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            cache = Path(os.environ["FASTVLM_CACHE"])
            own = environment(cache, TERM="xterm", **variables)
            own = {name: value for name, value in own.items() if name not in ("COLUMNS", "LINES")}
            os.execve(sys.executable, [*COMMAND, *arguments], own)
        ioctl(self._descriptor, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def wait_for(self, text: str, seconds: float = 90.0) -> None:
        """Reads until a text has come."""
        deadline = time.monotonic() + seconds
        while text not in self.output[self._read :]:
            ready, _, _ = select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{text!r} did not come after {self.output!r}"
            self.output += os.read(self._descriptor, 65536).decode(errors="replace")
        self._read = self.output.index(text, self._read) + len(text)

    def write(self, keys: str) -> None:
        """Types; Python notices an interrupt that comes just before it waits for a key only with the next key."""
        if "\x03" in keys:
            time.sleep(0.3)
            while self.output.rstrip("\x1b[?204h").endswith("> ") and self._is_held_up():
                time.sleep(0.05)
        os.write(self._descriptor, keys.encode())

    def _is_held_up(self) -> bool:
        """Whether the command has yet to wait for a key; unknown but on Linux."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S"
        except OSError:
            return False

    def end(self) -> int:
        """The exit code, after reading the rest."""
        try:
            while data := os.read(self._descriptor, 65536):
                self.output += data.decode(errors="replace")
        except OSError:  # Linux says so that the other end is closed
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
