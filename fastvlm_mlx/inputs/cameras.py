"""Cameras: which there are, and what FFmpeg opens for the name of one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.inputs.decoding import Place
from fastvlm_mlx.inputs.frames import optional

CAMERA = "@camera"

# Cameras of a Mac refuse a rate that they do not have, and FFmpeg's default is none of theirs.
_RATES = ("30", "25", "15", "60")
_ALLOW = "allow this terminal in System Settings > Privacy & Security > Camera, then start it anew"


class Camera(NamedTuple):
    """A camera.

    Attributes:
        address: What FFmpeg opens.
        title: What it is called.
    """

    address: str
    title: str


def list_cameras() -> list[Camera]:
    """The cameras of this machine, in the order of their numbers from 0.

    Raises:
        ImageError: If PyAV is not installed.
    """
    av: Any = optional("av", "cameras", "video")
    kind = _kind()
    list_devices = getattr(getattr(av, "device", None), "enumerate_input_devices", None)
    try:
        found = list_devices(kind) if list_devices is not None else []
    except (av.error.FFmpegError, ValueError, OSError):
        found = []
    cameras = [
        Camera(each.name, each.description or each.name)
        for each in found
        if ("video" in each.media_types or not each.media_types) and not each.description.startswith("Capture screen")
    ]
    return cameras or (list(_by_sysfs()) if kind == "v4l2" else [])


def _kind() -> str:
    return "avfoundation" if sys.platform == "darwin" else "v4l2"


def _by_sysfs() -> Iterator[Camera]:
    """Yields the video devices that Linux lists."""
    folder = "/sys/class/video4linux"
    try:
        devices = sorted(os.listdir(folder), key=lambda each: (len(each), each))
    except OSError:
        return
    for device in devices:
        try:
            with open(f"{folder}/{device}/name", encoding="utf-8", errors="replace") as file:
                title = file.read(200).strip()
        except OSError:
            continue
        if device.startswith("video"):
            yield Camera(f"/dev/{device}", title or device)


def camera_places(name: str) -> list[Place]:
    """What `@camera`, `@camera:1`, `@camera:TITLE` or `@camera:/dev/video2` may be; the first that opens is it.

    Raises:
        ImageError: If there is no such camera, or PyAV is not installed.
    """
    rest = name.partition(":")[2]
    shown = printable(name)
    camera = Camera(rest, rest) if rest.startswith("/dev/") else _choose(rest, shown)
    if _kind() == "v4l2":
        return [_place(camera.address, shown, {})]
    return [_place(f"{camera.title}:none", shown, {"framerate": rate}) for rate in _RATES]


def _choose(rest: str, shown: str) -> Camera:
    cameras = list_cameras()
    if not cameras:
        hint = f"; if there is one, {_ALLOW}" if sys.platform == "darwin" else ""
        raise ImageError(f"{shown}: no camera was found{hint}")
    number = int(rest or 0) if not rest or (rest.isascii() and rest.isdigit() and len(rest) < 4) else None
    if number is not None and number < len(cameras):
        return cameras[number]
    if number is None:
        for camera in cameras:
            if rest.casefold() in camera.title.casefold():
                return camera
    listed = names([f"{place}: {camera.title}" for place, camera in enumerate(cameras)])
    raise ImageError(f"{shown}: no such camera; there are {listed}")


def _place(address: str, name: str, options: dict[str, str]) -> Place:
    return Place(
        address=address,
        name=name,
        format=_kind(),
        options=options,
        device=True,
        explain=_explain,
        dark=f"shows only black; its cover may be closed{f', or {_ALLOW}' if sys.platform == 'darwin' else ''}",
    )


def _explain(err: BaseException) -> str | None:
    """Why a camera cannot be opened or read on, and what to do; None if that is not known."""
    number = getattr(err, "errno", None)
    if number == errno.EBUSY:
        return "the camera is in use; close the other program"
    if number in (errno.EACCES, errno.EPERM):
        what = _ALLOW if sys.platform == "darwin" else "join the group video: sudo usermod -aG video $USER"
        return f"the camera may not be used; {what}"
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "there is no such camera, or it was unplugged"
    if number == errno.EIO and sys.platform == "darwin":
        return f"the camera cannot be opened; another program may use it, or {_ALLOW}"
    return None
