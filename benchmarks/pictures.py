"""Measures what a picture costs before the model sees it, by its format and size: decoding, and resizing to a square.

Pictures are synthetic, with grain that takes a decoder about as long as a photograph's. HEIC files are written by
pillow-heif, whose rows are left out where it is not installed; they are read as the package reads them. The
measurements of all pictures take turns.

    python benchmarks/pictures.py             # a minute on two cores
    python benchmarks/pictures.py --record    # into benchmarks/results, and the table into README.md
"""

import argparse
import io
import os
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

from PIL import Image
from recording import write_report, write_tables

from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.formatting import as_markdown
from fastvlm_mlx.inputs.images import load_turned
from fastvlm_mlx.inputs.resizing import resize

RESOLUTIONS = (256, 512, 1024)
SIDEWAYS = 6
"""The EXIF orientation of most photographs that a phone takes upright."""

Samples = dict[str, dict[str, list[float]]]
"""Seconds by picture and step: `decode`, or the pixels per side."""


def pictures() -> dict[str, bytes]:
    """Returns the encoded pictures, by their names in the table."""
    found = {}
    for megapixels in (1.2, 12):
        encoded = Images(megapixels=megapixels)(0)
        found[f"JPEG, {megapixels:g} megapixels"] = encoded
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
        if megapixels > 2:
            exif = Image.Exif()
            exif[0x0112] = SIDEWAYS
            found[f"JPEG, {megapixels:g} megapixels, sideways"] = _encoded(image, "JPEG", exif=exif)
        found[f"WebP, {megapixels:g} megapixels"] = _encoded(image, "WEBP")
        if find_spec("pillow_heif"):
            import_module("pillow_heif").register_heif_opener()
            found[f"HEIC, {megapixels:g} megapixels"] = _encoded(image, "HEIF")
    return found


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, quality=90, **options)
    return file.getvalue()


def measure(runs: int) -> Samples:
    """Returns seconds for each step of each picture, without those of the first run."""
    encoded = pictures()
    samples: Samples = {name: {} for name in encoded}
    for run in range(runs + 1):
        for name, data in encoded.items():
            start = time.perf_counter()
            picture = load_turned(data)
            times = {"decode": time.perf_counter() - start}
            for side in RESOLUTIONS:
                start = time.perf_counter()
                resize(picture, side)
                times[str(side)] = time.perf_counter() - start
            if run:
                for step, seconds in times.items():
                    samples[name].setdefault(step, []).append(seconds)
    return samples


def table(values: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a report's table."""
    machine = Conditions.from_dict(values["conditions"]).machine
    yield as_markdown(
        [
            ["ms", "decode", *(f"resize to {side} px" for side in RESOLUTIONS)],
            *(
                [name, *(f"{1000 * median(times):.1f}" for times in steps.values())]
                for name, steps in values["samples"].items()
            ),
        ]
    )
    yield ""
    yield f"Medians of {values['runs']} runs that took turns in one process: {machine.chip}, {values['cores']} cores."


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="into the tracked results, and the tables into README.md")
    options = parser.parse_args()
    before = conditions()
    values = {
        "conditions": before.to_dict(),
        "runs": options.runs,
        "cores": os.cpu_count(),
        "samples": measure(options.runs),
    }
    print("\n".join(table(values)))
    print(write_report("pictures", values, record=options.record))
    if options.record:
        write_tables("pictures", table)


if __name__ == "__main__":
    main()
