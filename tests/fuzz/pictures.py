"""Small pictures in files of every format, whole and with damaged bytes."""

import functools
import io
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, features

from tests.fuzz import damage
from tests.fuzz.room import Room
from tests.fuzz.subject import look_at

_SAVED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "RGB", {"pnginfo": "text"}),
    ("PNG", "P", {"transparency": 1}),
    *(("JPEG", mode, {"quality": 60}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"exif": "turned"}),
    *(("GIF", mode, {}) for mode in ("L", "P")),
    ("GIF", "P", {"save_all": True, "append_images": "more"}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I;16", "F")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB", "YCbCr")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    *(("ICO", mode, {"sizes": [(16, 16), (32, 32)]}) for mode in ("RGB", "RGBA")),
    *(("TGA", mode, {"compression": kind}) for mode in ("L", "P", "RGB", "RGBA") for kind in (None, "tga_rle")),
    *(("QOI", mode, {}) for mode in ("RGB", "RGBA")),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
    *(("JPEG2000", mode, {}) for mode in ("L", "RGB", "RGBA")),
    *(("AVIF", mode, {}) for mode in ("RGB", "RGBA")),
)
"""Formats, modes and options; those that this machine's Pillow cannot write are left out."""
_FEATURES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}


def drawing(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    """A small picture in a mode of Pillow's."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((5, 3, size[0] - 9, size[1] - 4), fill=(200, 40, 90))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")  # type: ignore[return-value]
    return image.convert(mode)


@functools.cache
def files() -> dict[str, bytes]:
    """A small file of every format, mode and option."""
    from PIL.PngImagePlugin import PngInfo

    saved = {}
    for number, (kind, mode, options) in enumerate(_SAVED):
        if kind in _FEATURES and not features.check(_FEATURES[kind]):
            continue
        image, options = drawing(mode), dict(options)
        if options.get("pnginfo"):
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("comment", "a" * 500, zip=True)
            options["icc_profile"] = bytes(300)
        if options.get("exif"):
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        if options.get("append_images"):
            options["append_images"] = [drawing(mode).rotate(90), drawing(mode).rotate(45)]
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        saved[f"{kind} {mode} {number}"] = buffer.getvalue()
    return saved


def picture(random: Random, room: Room) -> None:
    """A small file of any format with damaged bytes."""
    data = random.choice(list(files().values()))
    if random.random() < 0.5:  # the headers
        end = random.choice((16, 64, 256))
        data = damage.some_bytes(random, data[:end]) + data[end:]
    else:
        data = damage.some_bytes(random, data)
    look_at(data)
