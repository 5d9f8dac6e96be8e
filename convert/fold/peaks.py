"""Finds how large a tower's activations get, on images that are rendered here and on the user's."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.convert.fold.operations import Array
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.model.vision import FastViTHD

RESOLUTION = 256
"""Pixels per side: 16 visual tokens, a sixteenth of the work of the resolution that the models are tuned for."""

_PREFIX = "vision_tower."


def images(paths: Iterable[str | Path] = ()) -> Array:
    """Extreme and ordinary pictures, the same every time, and those of the user: (B, R, R, 3) in [0, 1].

    An edge between black and white, colour gradients, checks over noise, a page of text.

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
    """A page of text-like writing with a coloured figure."""
    page = Image.new("RGB", (RESOLUTION, RESOLUTION), "white")
    draw = ImageDraw.Draw(page)
    for line in range(4, RESOLUTION // 2, 12):
        draw.text((6, line), "The quick brown fox jumps over the lazy dog 0123456789", fill="black")
    draw.ellipse((20, 140, 120, 240), fill=(200, 30, 30))
    draw.rectangle((140, 150, 240, 230), fill=(20, 60, 190))
    return np.asarray(page, np.float32) / 255


def array(rows: Iterable[Array]) -> mx.array:
    """MLX's copy of a tensor given in chunks of rows."""
    value = mx.array(np.concatenate(list(rows)))
    mx.eval(value)
    return value


def view(value: mx.array) -> Array:
    """The memory of a float32 MLX array."""
    return np.array(value, copy=False)


def peaks(
    config: VisionConfig, weights: Mapping[str, mx.array], pictures: Array, notify: Callable[[str], None]
) -> dict[str, float]:
    """The largest magnitude of every activation of a tower over all `pictures`, by the names of `FastViTHD.trace`.

    Args:
        config: The tower's architecture, unscaled.
        weights: Its parameters in float32, `vision_tower.…`.
        pictures: (B, R, R, 3) in [0, 1].
        notify: Told what is being done.

    Raises:
        ConversionError: If an activation is not finite even in float32.
    """
    tower = FastViTHD(config)
    tower.load_weights([(name.removeprefix(_PREFIX), value) for name, value in weights.items()])
    result: dict[str, float] = {}
    for number, picture in enumerate(pictures, 1):
        notify(f"calibrating float16 on picture {number} of {len(pictures)}")
        for name, peak in tower.trace(mx.array(picture)[None]).items():
            result[name] = float(np.maximum(result.get(name, 0.0), peak.item()))
    if broken := [name for name, peak in result.items() if not np.isfinite(peak)]:
        raise ConversionError(f"the vision tower's activations overflow even float32, first at {broken[0]}")
    return result
