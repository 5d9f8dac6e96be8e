"""A display of X11 without a screen, for tests of the screen and the clipboard."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

NEEDED = ("Xvfb", "xclip")


def missing() -> str:
    """Why there can be no display; empty if there can be one."""
    absent = [program for program in NEEDED if shutil.which(program) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


@contextmanager
def display(size: str = "320x240x24") -> Iterator[str]:
    """The name of a display of its own."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", size, "-nolisten", "tcp", "-noreset"]
    server = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
    try:
        os.close(writing)
        with os.fdopen(reading) as file:
            yield f":{int(file.readline())}"
    finally:
        server.terminate()
        server.wait(60)


def copy(kind: str, data: bytes) -> None:
    """Puts data of a MIME type into the clipboard of $DISPLAY, and returns when they can be pasted."""
    xclip = ["xclip", "-selection", "clipboard", "-target", kind]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*xclip, "-in"], input=data, check=True, **quiet)
    # xclip returns before its copy in the background owns the selection.
    deadline = time.monotonic() + 60
    while subprocess.run([*xclip, "-out"], capture_output=True).stdout != data:
        assert time.monotonic() < deadline, "the clipboard does not take what is copied"
        time.sleep(0.01)
