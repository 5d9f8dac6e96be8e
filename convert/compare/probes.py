"""Images and prompts that checkpoints are compared on: rendered scenes, and the images of the user.

Shapes: B probes, R resolution, T token ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from fastvlm_mlx.arguments import StrPath, file_path, items
from fastvlm_mlx.convert.arrays import Array
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.inputs.processor import FastVLMProcessor

SCENES = 5
"""The number of rendered images that checkpoints are compared on."""

CALIBRATION_SEEDS = range(1000, 1032)
"""The seeds of the rendered images that quantization is calibrated on; checkpoints are compared on others."""

RESOLUTION = 192
"""Pixels per side: enough to exercise every kind of layer, and a full-size tower takes a second."""

PROMPTS = (
    "Describe the image.",
    "What is written in the image?",
    "How many objects are there, and which colours do they have?",
    "What is in the middle of the image?",
)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2"}


@dataclass(frozen=True)
class Probes:
    """Images, each with a prompt.

    Attributes:
        pixels: (B, R, R, 3) in [0, 1].
        prompts: The token ids (T,) of each prompt, one of them `IMAGE_TOKEN`.
    """

    pixels: Array
    prompts: tuple[npt.NDArray[np.int32], ...]

    @classmethod
    def of(
        cls, processor: FastVLMProcessor, images: Iterable[Path] = (), seeds: Iterable[int] = range(SCENES)
    ) -> "Probes":
        """Rendered images and those of the user, each with one of `PROMPTS`.

        Raises:
            ImageError: If an image cannot be read.
        """
        photographs = [preprocess(load_image(path), RESOLUTION).astype(np.float32) / 255 for path in images]
        pixels = np.stack([*map(scene, seeds), *photographs])
        prompts = [
            np.array(processor.encode(PROMPTS[number % len(PROMPTS)], n_images=1), np.int32)
            for number in range(len(pixels))
        ]
        return cls(pixels=pixels, prompts=tuple(prompts))


def scene(seed: int) -> Array:
    """An image (R, R, 3) in [0, 1]: coloured shapes and a text on a background of two colours."""
    random = np.random.default_rng(seed)
    side = RESOLUTION
    colours = random.integers(0, 256, (16, 3))
    ramp = np.linspace(0, 1, side)[:, None, None]
    grain = random.normal(0, random.uniform(0, 8), (side, side, 3))
    background = np.clip(colours[0] * (1 - ramp) + colours[1] * ramp + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(background))
    draw = ImageDraw.Draw(image)
    for colour in colours[2 : 2 + int(random.integers(2, 8))]:
        x, y = random.integers(0, side, 2)
        radius = int(random.integers(side // 24, side // 5))
        box = (x - radius, y - radius, x + radius, y + radius)
        fill = tuple(map(int, colour))
        match int(random.integers(4)):
            case 0:
                draw.ellipse(box, fill=fill)
            case 1:
                draw.rectangle(box, fill=fill)
            case 2:
                draw.regular_polygon((int(x), int(y), radius), int(random.integers(3, 7)), fill=fill)
            case _:
                draw.ellipse(box, outline=fill, width=radius // 4 + 1)
    text = "".join(random.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "), int(random.integers(3, 12))))
    left, top = map(int, random.integers(0, side // 2, 2))
    draw.text((left, top), text, fill=tuple(map(int, colours[-1])), font_size=int(random.integers(12, 48)))
    return np.asarray(image, np.float32) / 255


def image_files(paths: Iterable[StrPath]) -> list[Path]:
    """The images that `paths` name, those of a folder in the order of their names.

    Raises:
        ConversionError: If one does not exist, or a folder holds no image.
        ImageError: If a file that is named is no image.
        ConfigError: If `paths` is no list of paths.
    """
    files = []
    for name in items(paths, "calibration", "a list of images and folders"):
        path = file_path(name, "an image for calibration")
        if not path.exists():
            raise ConversionError(f"{path}: no such image or folder of calibration images")
        images = [path]
        if path.is_file():
            load_image(path)  # a mistake is found before any work
        if path.is_dir():
            images = sorted(
                file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
            )
        if not images:
            raise ConversionError(f"{path}: holds no image to calibrate on ({', '.join(sorted(_SUFFIXES))})")
        files += images
    return files
