"""Images that clients name: a `data:` URL always; a web address or a file only where the server's settings allow it."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import threading
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable, readable_bytes
from fastvlm_mlx.inputs.formats import open_image
from fastvlm_mlx.inputs.named import HEAD_BYTES, PDF, kind_of
from fastvlm_mlx.inputs.pages import draw_pages
from fastvlm_mlx.inputs.sources import Allow, Encoded, read
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.settings import Settings

FETCH_SECONDS = 10.0
MOST_FETCHES = 4
"""Images that are fetched at the same time; each holds a thread for as long as a foreign server likes."""

MOST_DRAWINGS = 2
"""PDFs that are drawn at the same time; each is a process."""

_PUBLIC = Allow(urls=True)
_drawing = threading.BoundedSemaphore(MOST_DRAWINGS)
_fetching = threading.BoundedSemaphore(MOST_FETCHES)


class Images:
    """The images of one request, read and checked one by one, within what the server allows.

    Reading waits for disks and networks; so it is for a thread of its own, not for the event loop.

    Args:
        settings: Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._count = 0
        self._bytes = 0

    def read(self, url: str, where: str) -> list[Encoded]:
        """The bytes of an image, or of each page of a PDF as one.

        Args:
            url: A `data:`, http or https URL, a `file:` URL or a path.
            where: The part of the request that names it, such as `messages[0].content[1]`.

        Raises:
            ApiError: If it is not allowed, cannot be read, or is no image; the message begins with `where`.
        """
        self._count += 1
        if self._count > (most := self._settings.max_images):
            raise _refusal(where, f"a request can have at most {most} images", "too_many_images")
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return self._checked(_decode(url, where), where)
        if scheme.startswith(("http://", "https://")):
            return self._checked(self._fetch(url, where), where)
        return self._checked(self._open(url, where), where)

    def _checked(self, data: bytes, where: str) -> list[Encoded]:
        """An image of a known kind, and not too large; the pages of a PDF."""
        self._bytes += len(data)
        if self._bytes > (most := self._settings.max_body_bytes):
            raise _refusal(where, f"the images of a request can have at most {readable_bytes(most)}", "image_too_large")
        if kind_of(data[:HEAD_BYTES]) == PDF:
            return self._pages(data, where)
        encoded = Encoded(data, where)
        try:
            width, height = open_image(encoded).size
        except ImageError as err:
            raise ApiError(400, str(err), param=where, code="invalid_image") from err
        if width * height > (pixels := self._settings.max_pixels):
            found = f"has {width}×{height} pixels, more than {pixels:,}"
            raise _refusal(where, f"{found}, the most that is read; reduce it", "image_too_large")
        return [encoded]

    def _pages(self, data: bytes, where: str) -> list[Encoded]:
        """The pages of a PDF, each of which counts as an image."""
        most = self._settings.max_images - self._count + 1
        if not _drawing.acquire(blocking=False):
            reason = f"{where}: {MOST_DRAWINGS} PDFs are being drawn already; ask again"
            raise ApiError(429, reason, kind="rate_limit_error", param=where, code="too_many_documents", retry_after=1)
        try:
            pages = draw_pages(data, where, most=most)
        except ImageError as err:
            raise ApiError(400, str(err), param=where, code="unsupported_image") from err
        finally:
            _drawing.release()
        self._count += len(pages) - 1
        return pages

    def _fetch(self, url: str, where: str) -> bytes:
        if not self._settings.allow_image_urls:
            raise _refusal(
                where,
                "addresses of images are not fetched here; send a data: URL, or start the server with "
                "--allow-image-urls",
                "image_url_not_allowed",
            )
        if not _fetching.acquire(blocking=False):
            reason = f"{where}: {MOST_FETCHES} images are being fetched already; ask again"
            raise ApiError(429, reason, kind="rate_limit_error", param=where, code="too_many_fetches", retry_after=1)
        try:
            return read(url, allow=_PUBLIC, timeout=FETCH_SECONDS).data
        except ImageError as err:
            raise _refusal(where, str(err).partition("; Allow(")[0]) from err
        finally:
            _fetching.release()

    def _open(self, url: str, where: str) -> bytes:
        """The bytes of a file below the folder that the server opens."""
        root = self._settings.media_root
        if root is None:
            raise _refusal(
                where,
                f"{_shown(url)} is not a data: URL, and files are not read here; send the image as "
                "data:image/png;base64,…",
                "file_not_allowed",
            )
        place = urlsplit(url) if url[:5].lower() == "file:" else None
        if place is not None and place.netloc not in ("", "localhost"):
            raise _refusal(where, f"{_shown(url)} names a file of another machine", "file_not_allowed")
        name = unquote(place.path) if place is not None else url
        try:
            top = root.resolve(strict=True)
            path = (top / name).resolve(strict=True)
            if not path.is_relative_to(top):
                raise FileNotFoundError(name)
            data = _contents(path, self._settings.max_body_bytes)
        except (OSError, ValueError, RuntimeError) as err:  # RuntimeError: links in a circle, before Python 3.13
            # One message for all: it tells nothing about files elsewhere.
            raise _refusal(where, f"{_shown(url)}: no such file below the media folder", "file_not_found") from err
        if data is None:
            most = readable_bytes(self._settings.max_body_bytes)
            raise _refusal(where, f"{_shown(url)} is larger than {most}", "image_too_large")
        return data


def _contents(path: Path, most: int) -> bytes | None:
    """The bytes of an ordinary file; None if they are more than `most`.

    Raises:
        OSError: If there is none, or it is of another kind.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # a pipe without a writer would wait
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(path)
        return file.read(most) if status.st_size <= most else None


def _decode(url: str, where: str) -> bytes:
    """The bytes of a `data:` URL."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise _refusal(where, "a data: URL has the form data:image/png;base64,…")
    _, *parameters = header[5:].lower().split(";")
    try:
        data = unquote_to_bytes(payload) if "%" in payload else payload.encode()
    except UnicodeEncodeError as err:
        raise _refusal(where, "the data: URL is not valid Unicode") from err
    return _base64(data, where) if parameters and parameters[-1].strip() == "base64" else data


def _base64(text: bytes, where: str) -> bytes:
    """The bytes that base64 stands for; spaces and line ends may be in it, nothing else."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        pass
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as err:
        raise _refusal(where, f"not valid base64 ({printable(err)})") from err


def _shown(url: str) -> str:
    """A name as messages show it."""
    return printable(url, 80) or "an empty name"


def _refusal(where: str, reason: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, f"{where}: {reason}", param=where, code=code)
