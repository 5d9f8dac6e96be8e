"""Moving pictures: the name of a film, stream, camera, screen or test pattern -> its frames."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from fastvlm_mlx.arguments import as_real
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.cameras import CAMERA, camera_places, list_cameras
from fastvlm_mlx.inputs.decoding import Place
from fastvlm_mlx.inputs.frames import MAX_RATE, Frame, Stream
from fastvlm_mlx.inputs.named import meant
from fastvlm_mlx.inputs.playing import VideoStream
from fastvlm_mlx.inputs.screen import SCREEN, WINDOW, ScreenStream, is_screen, screens, windows

__all__ = ["Frame", "Source", "Stream", "list_sources", "open_stream"]

TEST = "@test"

NETWORK_TIMEOUT = 10.0
"""Seconds that a stream on the network may take to open, and to send on."""

_PATTERN = "testsrc2=size=640x480:rate=30,realtime"
_URL = re.compile(r"(https?|rtsps?)://", re.IGNORECASE)
# FFmpeg's demuxers of films. Others read text as pictures, or open what a file names.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,ivf,nut,mxf,rm,wtv,gif,apng,h264,hevc,m4v,mjpeg,mpegvideo,obu,"
    "yuv4mpegpipe,dv,swf,vc1,av1,webp_anim"
)
_PROTOCOLS = "http,https,tls,tcp,udp,rtp,rtsp,rtsps,srtp,crypto"


class Source(NamedTuple):
    """Something that can be watched.

    Attributes:
        name: What `open_stream` takes.
        title: What it is.
    """

    name: str
    title: str


def open_stream(
    name: str,
    *,
    rate: float | None = None,
    start: float = 0,
    end: float | None = None,
    notify: Callable[[str], None] | None = None,
) -> Stream:
    """Opens what gives frames: a film's path, an http or rtsp URL, a camera, the screen, a test pattern or graph.

    `@camera`, `@camera:1`, `@camera:TITLE`, `@screen`, `@screen:2` and `@window:TITLE` are live. So is `@test`, a
    pattern that moves, and a graph (`lavfi:GRAPH`) with FFmpeg's filter `realtime`. Live sources give frames by the
    clock, films as fast as they are taken.

    Args:
        name: Of the source, as the user of this machine gives it; never one that comes from strangers.
        rate: The most frames a second; what comes earlier is left out. None is every frame.
        start: Seconds of a film that are left out.
        end: Seconds at which a film ends.
        notify: Called once if a film is damaged or incomplete, but can be read in part.

    Raises:
        ImageError: If there is no such source, it cannot be read, or what reads it is not installed.
        ConfigError: If `rate`, `start` or `end` is no such number.
    """
    checked = _positive(rate, "rate", MAX_RATE)
    if not as_real(start) >= 0 or math.isinf(as_real(start)):
        raise ConfigError(f"start must be a number of seconds, at least 0, not {printable(start)}")
    if end is not None and not as_real(end) > as_real(start):
        raise ConfigError(f"end must be a number of seconds after start ({start:g}), not {printable(end)}")
    if is_screen(name):
        return ScreenStream(name, rate=checked)
    *others, last = camera_places(name) if _is_camera(name) else [_place(name)]
    for place in others:
        with contextlib.suppress(ImageError):
            return VideoStream(place, rate=checked, notify=notify)
    return VideoStream(last, rate=checked, start=float(start), end=end, notify=notify)


def list_sources() -> list[Source]:
    """The cameras, screens and windows of this machine, and the test pattern."""
    try:
        cameras = list_cameras()
    except ImageError:  # PyAV is not installed
        cameras = []
    found = [Source(f"{CAMERA}:{number}", camera.title) for number, camera in enumerate(cameras)]
    found += [Source(f"{SCREEN}:{number}", f"screen {number}") for number in range(1, screens() + 1)]
    if sys.platform == "darwin":
        found += [Source(f"{WINDOW}:{title}", "window") for _, title in windows()]
    return [*found, Source(TEST, "a test pattern that moves")]


def _is_camera(name: str) -> bool:
    return name.partition(":")[0] == CAMERA


def _positive(value: float | None, name: str, most: float) -> float | None:
    if value is None:
        return None
    if not 0 < as_real(value) <= most:
        raise ConfigError(f"{name} must be a number above 0, at most {most:g}, not {printable(value)}")
    return float(value)


def _place(name: str) -> Place:
    if name == TEST:
        return _graph(_PATTERN, name)
    if name.startswith("@") and not os.path.lexists(name):
        near = meant(name, (CAMERA, SCREEN, WINDOW, TEST))
        known = f"there are {CAMERA}, {SCREEN}, {WINDOW}:TITLE and {TEST}"
        raise ImageError(f"{printable(name)}: no such source; {f'did you mean {printable(near)}?' if near else known}")
    if name.lower().startswith("lavfi:"):
        return _graph(name[6:], printable(name))
    if _URL.match(name):
        return Place(
            address=name,
            name=printable(name),
            timeout=NETWORK_TIMEOUT,
            options={"protocol_whitelist": _PROTOCOLS, "rtsp_flags": "prefer_tcp", "user_agent": "fastvlm-mlx"},
        )
    return _file(name)


def _graph(graph: str, name: str) -> Place:
    realtime = re.search(r"(^|[,;\]])\s*realtime\b", graph) is not None
    return Place(address=graph, name=name, format="lavfi", device=realtime)


def _file(name: str) -> Place:
    shown = printable(name)
    if "://" in name:
        raise ImageError(f"{shown}: only http://, https://, rtsp:// and rtsps:// can be opened")
    path = os.path.expanduser(name) if name.startswith("~") and not os.path.lexists(name) else name
    if os.path.isdir(path):
        raise ImageError(f"{shown}: is a folder, not a film")
    if not os.path.exists(path):
        raise ImageError(f"{shown}: no such file")
    if not os.path.getsize(path):
        raise ImageError(f"{shown}: is empty (0 bytes)")
    return _film(path, shown)


def open_film(source: str | bytes, name: str, *, notify: Callable[[str], None] | None = None) -> VideoStream:
    """Opens a film by its path or content, to look at its moments.

    Raises:
        ImageError: If it cannot be read.
    """
    return VideoStream(_film(source, name), notify=notify)


def _film(source: str | bytes, name: str) -> Place:
    """What FFmpeg opens for a film; what that names, such as the parts of a playlist, is not opened."""
    address = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    return Place(address=address, name=name, options={"protocol_whitelist": "file", "format_whitelist": _FORMATS})
