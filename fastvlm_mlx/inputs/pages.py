"""The pages of a PDF that comes from a stranger, drawn by a process of its own, which ends whatever the PDF does to it.

`python -m fastvlm_mlx.inputs.pages MOST SIDE` is that process: it reads the PDF from stdin, and writes a PNG for each
page to stdout, each after its length in four bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import resource
import struct
import subprocess
import sys

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import counted, printable
from fastvlm_mlx.inputs.sources import Encoded

SECONDS = 20.0
"""Seconds that drawing all pages of a document may take."""
SIDE = 2048
_LENGTH = struct.Struct(">I")
_MEMORY = 4 << 30
_NAME = "the PDF"


def draw_pages(data: bytes, name: str, *, most: int, seconds: float = SECONDS) -> list[Encoded]:
    """All pages of a PDF as pictures.

    Args:
        data: The PDF.
        name: In messages.
        most: How many pages it may have.
        seconds: How long this may take.

    Raises:
        ImageError: If it cannot be read, has more pages, takes too long, or pypdfium2 is not installed.
    """
    if importlib.util.find_spec("pypdfium2") is None:
        raise ImageError(f"{name}: reading PDFs needs pypdfium2; install it with: pip install 'fastvlm-mlx[pdf]'")
    command = [sys.executable, "-m", "fastvlm_mlx.inputs.pages", str(most), str(SIDE)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as err:
        raise ImageError(f"{name}: {_NAME} was not drawn within {seconds:g} s; send its pages as images") from err
    except OSError as err:
        raise ImageError(f"{name}: {_NAME} cannot be drawn ({err.strerror or err})") from err
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() if done.returncode == 1 else ""
        reason = said.removeprefix(f"{_NAME}: ") if said.startswith(_NAME) else "cannot be drawn; it may be damaged"
        raise ImageError(f"{name}: {_NAME}: {printable(reason)}")
    pages: list[Encoded] = []
    at = 0
    while at < len(done.stdout):
        (length,) = _LENGTH.unpack_from(done.stdout, at)
        at += _LENGTH.size
        pages.append(Encoded(done.stdout[at : at + length], f"{name}, page {len(pages) + 1}", "image/png"))
        at += length
    return pages


def _draw(most: int, side: int) -> int:
    """Draws what stdin holds; returns the exit code."""
    from PIL import Image

    from fastvlm_mlx.inputs.pdf import Document

    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):  # macOS has no such limit on memory
            resource.setrlimit(limit, (value, value))
    try:
        document = Document(sys.stdin.buffer.read(), _NAME)
        if document.pages > most:
            raise ImageError(f"{_NAME}: has {counted(document.pages, 'page')}, more than {most}, the most images here")
        for page in range(1, document.pages + 1):
            with io.BytesIO() as file:
                Image.fromarray(document.render(page, side)).save(file, "PNG", compress_level=1)
                sys.stdout.buffer.write(_LENGTH.pack(file.tell()) + file.getvalue())
    except ImageError as err:
        sys.stderr.buffer.write(str(err).encode("utf-8", "backslashreplace"))
        return 1
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(_draw(int(sys.argv[1]), int(sys.argv[2])))
