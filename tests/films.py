"""Films made for tests: each frame's colour tells its time."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = (64, 48)


def shade(number: int) -> NDArray[np.uint8]:
    """A grey frame (48, 64, 3) that is lighter the later it comes; its left upper corner is red."""
    frame = np.full((SIZE[1], SIZE[0], 3), min(250, 10 + 10 * number), np.uint8)
    frame[:16, :16] = (250, 0, 0)
    return frame


def number_of(pixels: NDArray[np.uint8]) -> int:
    """Which frame of `shade` it is, by its middle."""
    height, width, _ = pixels.shape
    return round((float(pixels[height // 2, width // 2].mean()) - 10) / 10)


def write(
    path: Path,
    times: Sequence[float],
    *,
    draw: Callable[[int], NDArray[np.uint8]] = shade,
    codec: str = "libx264",
    gop: int = 5,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a film with a frame at each of `times`, and a key frame every `gop` of them."""
    import av

    height, width, _ = draw(0).shape
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.gop_size = width, height, gop
        stream.pix_fmt = {"png": "rgb24", "ffv1": "bgr0", "mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, 25 if codec in ("mjpeg", "mpeg2video", "gif") else 1000)
        if codec == "libx264":
            stream.options = {"crf": "12", "preset": "ultrafast", "bf": "0", "sc_threshold": "0"}
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
