"""Sources of images: a path, a URL, bytes or an open file -> encoded bytes, within what the caller allows."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, Union

from fastvlm_mlx.arguments import flag
from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from fastvlm_mlx.inputs.turned import TurnedImage


class SupportsArray(Protocol):
    """What NumPy can make an array of: its own arrays, MLX's and others."""

    def __array__(self) -> NDArray[Any]: ...


ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, "IO[bytes]", "Image", SupportsArray, "TurnedImage"
]
"""A path, an http(s) or `data:` URL, encoded bytes, an open binary file, a PIL image or an array; or what was loaded.

Arrays, MLX's too, are uint8 or floats in [0, 1] of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
"""

MAX_FILE_BYTES = 1 << 30
MAX_DOWNLOAD_BYTES = 64 << 20
DOWNLOAD_TIMEOUT = 20.0
"""Seconds within which a URL has to be fetched completely."""

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


@dataclass(frozen=True, kw_only=True)
class Allow:
    """What the name of an image may refer to.

    Bytes, `data:` URLs, open files, PIL images and arrays carry their own content and are always allowed.

    >>> Allow(urls=True) == Allow.PUBLIC
    True

    Attributes:
        files: Paths: any file that this process can read.
        urls: http and https URLs of hosts on the public internet.
        private_hosts: All other hosts, too: this machine, its network, a cloud's metadata service.

    Raises:
        ConfigError: If one of them is not a truth value.
    """

    files: bool = False
    urls: bool = False
    private_hosts: bool = False

    ALL: ClassVar[Allow]
    """Everything: for what the user of this machine names, as on the command line."""
    PUBLIC: ClassVar[Allow]
    """Public URLs: the default for strings in messages."""
    DATA_ONLY: ClassVar[Allow]
    """Neither files nor URLs: for what comes from strangers."""

    def __post_init__(self) -> None:
        """Rejects what is no truth value; None is False."""
        for name in ("files", "urls", "private_hosts"):
            object.__setattr__(self, name, flag(getattr(self, name), name))


Allow.ALL = Allow(files=True, urls=True, private_hosts=True)
Allow.PUBLIC = Allow(urls=True)
Allow.DATA_ONLY = Allow()


class Encoded(NamedTuple):
    """The encoded bytes of an image.

    Attributes:
        data: As they were read.
        name: The source's name in messages.
        media_type: What a server says it is; empty if unknown.
    """

    data: bytes
    name: str
    media_type: str = ""


def read(source: ImageSource | Encoded, *, allow: Allow = Allow.ALL, timeout: float = DOWNLOAD_TIMEOUT) -> Encoded:
    """Reads the encoded bytes of an image.

    An open file is read from its start if it can seek.

    Args:
        source: See `ImageSource`, but neither a PIL image nor an array; or what was read already, which is returned.
        allow: What `source` may refer to.
        timeout: Seconds for fetching a URL.

    Raises:
        ImageError: If the source is not allowed, or cannot be read.
    """
    if isinstance(source, Encoded):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Encoded(bytes(source), f"image of {memoryview(source).nbytes} bytes")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return Encoded(_decode_data_url(source), f"{printable(source[:40])}…")
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return _fetch(source, allow, timeout)
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return Encoded(_read_file(path, allow), printable(path))
    if callable(getattr(source, "read", None)):
        name = printable(getattr(source, "name", "image file"))
        return Encoded(_read_open_file(source, name), name)
    raise ImageError(
        f"an image must be a path, URL, bytes, binary file, PIL image or array, not {type(source).__name__}"
    )


def _read_file(path: str, allow: Allow) -> bytes:
    name = printable(path)
    if "://" in path:
        raise ImageError(f"{name}: only http://, https:// and data: URLs can be fetched")
    if not allow.files:
        raise ImageError(f"{name}: files may not be read here; allow=Allow(files=True) permits it")
    if not path:
        raise ImageError("'': no such file; the name is empty")
    try:
        # An existing file may be called ~.
        file_path = Path(path) if not path.startswith("~") or os.path.lexists(path) else Path(path).expanduser()
        with file_path.open("rb") as file:
            return _read_limited(file.read, MAX_FILE_BYTES, name)
    except FileNotFoundError as err:
        raise ImageError(f"{name}: no such file{_hint(path)}") from err
    except IsADirectoryError as err:
        raise ImageError(f"{name}: is a folder, not an image; name the files in it") from err
    except (OSError, ValueError, RuntimeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise ImageError(f"{name}: cannot be opened ({reason}){_hint(path)}") from err


def _hint(path: str) -> str:
    """Suggests what was meant by a path that does not exist."""
    if _BASE64.fullmatch(path):
        return "; base64 needs data:image/png;base64, before it"
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):
        return ""
    # macOS writes a narrow no-break space into the names of screenshots.
    if any(" ".join(other.split()) == " ".join(name.split()) for other in names if other != name):
        return "; a file there differs only in the kind of its spaces"
    return ""


def _read_open_file(file: Any, name: str) -> bytes:
    try:
        if callable(seekable := getattr(file, "seekable", None)) and seekable():
            file.seek(0)
        return _read_limited(file.read, MAX_FILE_BYTES, name)
    except OSError as err:
        raise ImageError(f"{name}: cannot be read ({err.strerror or err})") from err
    except ValueError as err:  # the file is closed
        raise ImageError(f"{name}: cannot be read ({err})") from err


def _read_limited(read: Any, limit: int, name: str) -> bytes:
    """Reads everything that `read(size)` returns.

    Raises:
        ImageError: If it is text or anything else but bytes, or more than `limit` bytes.
    """
    buffer = io.BytesIO()
    while chunk := read(1 << 20):
        if isinstance(chunk, str):
            raise ImageError(f"{name}: opened as text; open it in binary mode ('rb')")
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise ImageError(f"{name}: reading it gave {type(chunk).__name__}, not bytes; give an open binary file")
        buffer.write(chunk)
        if buffer.tell() > limit:
            raise ImageError(f"{name}: larger than {limit >> 20} MiB, the most that is read")
    return buffer.getvalue()


def _decode_data_url(url: str) -> bytes:
    from urllib.parse import unquote_to_bytes

    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{printable(url[:40])}: a data: URL has the form data:image/png;base64,…")
    try:
        data = unquote_to_bytes(payload)
        return base64.b64decode(b"".join(data.split()), validate=True) if header.lower().endswith(";base64") else data
    except binascii.Error as err:
        raise ImageError(f"{printable(header)},…: not valid base64 ({err})") from err
    except UnicodeEncodeError as err:
        raise ImageError(f"{printable(header)},…: not valid Unicode") from err


def _fetch(url: str, allow: Allow, timeout: float) -> Encoded:
    name = printable(url)
    if not allow.urls:
        raise ImageError(f"{name}: URLs may not be fetched here; allow=Allow(urls=True) permits it")

    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import quote

    from fastvlm_mlx.inputs.network import open_url

    deadline = time.monotonic() + timeout
    try:
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        with open_url(address, deadline=deadline, private_hosts=allow.private_hosts) as response:
            data = _read_limited(response.read1, MAX_DOWNLOAD_BYTES, name)
            expected = int(response.headers.get("Content-Length", len(data)))
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    except HTTPError as err:
        err.close()
        raise ImageError(f"{name}: the server answered {err.code} {printable(err.reason)}") from err
    except (HTTPException, OSError, ValueError) as err:
        reason = getattr(err, "reason", None) or err
        if isinstance(reason, TimeoutError):
            raise ImageError(f"{name}: not fetched within {timeout:g} s") from err
        raise ImageError(f"{name}: cannot be fetched ({printable(reason)})") from err
    if expected != len(data):
        raise ImageError(f"{name}: the connection broke after {len(data)} of {expected} bytes; try again")
    return Encoded(data, name, printable(media_type))
