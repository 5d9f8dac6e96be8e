"""Pages of PDFs as pictures, by PDFium, which one thread at a time may use."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.frames import optional
from fastvlm_mlx.inputs.sources import MAX_FILE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_PIXELS = 64_000_000
"""The most pixels of a page's picture."""

_pdfium = Lock()
_PASSWORD = 4


class Document:
    """An open PDF; nothing of it is drawn until it is wanted.

    Args:
        source: Its path or its content.
        name: In messages.

    Attributes:
        pages: How many it has.

    Raises:
        ImageError: If it cannot be read, or pypdfium2 is not installed.
    """

    def __init__(self, source: str | bytes, name: str) -> None:
        self._name = name
        with _pdfium:
            self._library: Any = optional("pypdfium2", f"{name}: reading PDFs", "pdf")
            try:
                if isinstance(source, str) and os.path.getsize(source) > MAX_FILE_BYTES:
                    raise ImageError(f"{name}: larger than {MAX_FILE_BYTES >> 20} MiB, the most that is read")
                # A document without pages leaves the reason of an earlier failure behind; so there is one to leave.
                self._library.raw.FPDF_LoadMemDocument(b" ", 1, None)
                self._document = self._library.PdfDocument(source)
                self.pages = len(self._document)
            except self._library.PdfiumError as err:
                raise ImageError(f"{name}: {_reason(err)}") from err
            except (OSError, ValueError, ctypes.ArgumentError) as err:
                raise ImageError(f"{name}: cannot be opened ({printable(err)})") from err
            with contextlib.suppress(self._library.PdfiumError):
                self._document.init_forms()  # what was filled in is drawn, too

    def render(self, page: int, side: int) -> NDArray[np.uint8]:
        """A page (H, W, 3) on white, upright; its longer side has `side` pixels.

        Args:
            page: From 1.
            side: Pixels.

        Raises:
            ImageError: If it is damaged, or has no size.
        """
        name = f"{self._name}#{page}"
        with _pdfium:
            try:
                sheet = self._document[page - 1]
                try:
                    width, height = sheet.get_size()
                    longer = max(width, height)
                    if not (math.isfinite(longer) and longer > 0 and min(width, height) > 0):
                        raise ImageError(f"{name}: the page has no size")
                    scale = side / longer
                    if math.ceil(width * scale) * math.ceil(height * scale) > MOST_PIXELS:
                        raise ImageError(f"{name}: its picture would have more than {MOST_PIXELS:,} pixels")
                    bitmap = sheet.render(scale=scale, rev_byteorder=True)
                    try:
                        return np.array(bitmap.to_numpy()[:, :, :3])
                    finally:
                        bitmap.close()
                finally:
                    sheet.close()
            except self._library.PdfiumError as err:
                raise ImageError(f"{name}: the page is damaged ({printable(err)})") from err
            except MemoryError as err:
                raise ImageError(f"{name}: the page does not fit into memory") from err

    def close(self) -> None:
        """Closes the file."""
        with _pdfium:
            self._document.close()


def _reason(err: Any) -> str:
    """Why a PDF cannot be opened."""
    if getattr(err, "err_code", None) == _PASSWORD:
        return "the PDF has a password; save a copy without it"
    return "not a PDF that can be read; it is damaged, incomplete or without pages"
