"""Measures how large a tower's activations get, on rendered images and on those of the user."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.convert.arrays import Array
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.model.vision import FastViTHD

RESOLUTION = 256
"""Pixels per side: 16 visual tokens, a sixteenth of the work of the resolution that the models are tuned for."""

_PREFIX = "vision_tower."


def images(paths: Iterable[str | Path] = ()) -> Array:
    """Calibration images (B, R, R, 3) in [0, 1]: four rendered ones, always the same, and those of the user.

    The rendered ones are an edge between black and white, colour gradients, checks over noise, and a page of text.

    Raises:
        ImageError: If one of `paths` cannot be read.
    """
    ramp = np.broadcast_to(np.linspace(0, 1, RESOLUTION, dtype=np.float32), (RESOLUTION, RESOLUTION))
    rows, columns = np.indices((RESOLUTION, RESOLUTION))
    coarse, fine = ((rows // size + columns // size) % 2 for size in (32, 1))
    edge = np.repeat((columns >= RESOLUTION // 2)[..., None], 3, axis=-1)
    gradients = np.stack([ramp, ramp.T, 1 - ramp], axis=-1)
    checks = np.stack([coarse, 1 - coarse, fine], axis=-1)
    checks[RESOLUTION // 2 :] = np.random.default_rng(0).integers(0, 2, (RESOLUTION // 2, RESOLUTION, 3))
    photographs = [preprocess(load_image(path), RESOLUTION).astype(np.float32) / 255 for path in paths]
    return np.stack([edge, gradients, checks, _page(), *photographs], dtype=np.float32)


def _page() -> Array:
    """A page of text with a coloured figure."""
    page = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    draw = ImageDraw.Draw(page)
    for line in range(4, RESOLUTION // 2, 12):
        draw.text((6, line), "The quick brown fox jumps over the lazy dog 0123456789", fill="black")
    draw.ellipse((20, 140, 120, 240), fill=(200, 30, 30))
    draw.rectangle((140, 150, 240, 230), fill=(20, 60, 190))
    return np.asarray(page, np.float32) / 255


def array(rows: Iterable[Array]) -> mx.array:
    """An MLX copy of a tensor that comes in chunks of rows."""
    value = mx.array(np.concatenate(list(rows)))
    mx.eval(value)
    return value


def view(value: mx.array) -> Array:
    """A NumPy view of a float32 MLX array."""
    return np.array(value, copy=False)


def activation_peaks(
    config: VisionConfig, weights: Mapping[str, mx.array], pixels: Array, notify: Notify
) -> dict[str, float]:
    """The largest magnitude of every activation over all images, by the names of `FastViTHD.activation_peaks`.

    Args:
        config: The tower's architecture, unscaled.
        weights: Its parameters in float32, `vision_tower.…`.
        pixels: (B, R, R, 3) in [0, 1].
        notify: Called with a label of the current step.

    Raises:
        ConversionError: If an activation is not finite even in float32.
    """
    tower = FastViTHD(config)
    tower.load_weights([(name.removeprefix(_PREFIX), value) for name, value in weights.items()])
    peaks: dict[str, float] = {}
    for number, image in enumerate(pixels, 1):
        notify(f"calibrating float16 on image {number} of {len(pixels)}")
        for name, peak in tower.activation_peaks(mx.array(image)[None]).items():
            peaks[name] = float(np.maximum(peaks.get(name, 0.0), peak.item()))
    if broken := [name for name, peak in peaks.items() if not np.isfinite(peak)]:
        raise ConversionError(f"the vision tower's activations overflow even float32, first at {broken[0]}")
    return peaks
