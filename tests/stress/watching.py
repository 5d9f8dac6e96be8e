"""Watches a film of demo scenes whose truth is known, by its own time or by the clock, and compares what is told.

python -m tests.stress.watching --scenes 120                  # by its own time: the subtitle track
python -m tests.stress.watching --scenes 100 --live --load 4  # by the clock, beside four processes that compute
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 384
RATE = 25
KINDS = ("cut", "cut", "fade", "slow fade", "black", "one more")
"""How one scene follows another; `one more` is a shape that comes in."""
_OVERLAP = 0.2
"""Seconds of a text over another scene than its own that count as wrong: two looks."""
_CUE = re.compile(r"^\d+\n(\S+) --> (\S+)\n(.*?)\n\n", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).parents[2]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A scene of the film.

    Attributes:
        kind: How it came.
        came: When more of it than of the one before was to be seen.
        start: From when on nothing else was.
        end: Until when.
        gone: When more of the next one was to be seen.
        truth: What it shows.
        still: What the model says of it as a picture.
    """

    kind: str
    came: float
    start: float
    end: float
    gone: float
    truth: str
    still: str


@dataclass(frozen=True)
class Cue:
    start: float
    end: float
    text: str


def _truth(shapes: Any) -> str:
    from demo import scenes

    names = [scenes._article(shape.name) for shape in sorted(shapes, key=lambda shape: shape.x)]
    text = scenes._listing(names, ", ", " and ")
    return f"{text[0].upper()}{text[1:]}."


def _one_more(rng: Random, image: Image.Image, scene: Any) -> tuple[Image.Image, Any] | None:
    """The scene with one more small shape, where there is room for one."""
    from demo import scenes

    radius = round(SIDE * scenes.SIZES["small"])
    taken = {shape.name for shape in scene.shapes}
    for _ in range(300):
        x, y = rng.uniform(radius, image.width - radius), rng.uniform(radius, image.height - radius)
        shape = scenes.Shape(
            shape=rng.choice(scenes.SHAPES),
            colour=rng.choice(tuple(scenes.COLOURS)),
            size="small",
            x=x,
            y=y,
            radius=radius,
        )
        free = all(
            np.hypot(x - other.x, y - other.y) > radius + other.radius and abs(x - other.x) > 0.06 * SIDE
            for other in scene.shapes
        )
        if free and shape.name not in taken and all(scenes._distance(x, y, t.box) > radius for t in scene.texts):
            image = image.copy()
            scenes._draw(rng, image, shape)
            return image, replace(scene, shapes=(*scene.shapes, shape))
    return None


def _canvas(image: Image.Image) -> Pixels:
    canvas = Image.new("RGB", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas)


def make(
    path: Path, count: int, seed: int, answer: Callable[[Pixels], str], lengths: tuple[float, float] = (1.5, 3.5)
) -> list[Shown]:
    """Writes a film of `count` scenes; returns what it shows."""
    import av

    from demo import scenes

    rng = Random(f"watching/{seed}")
    shown: list[Shown] = []
    number = 0
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12", "preset": "veryfast"}

        def put(pixels: Any) -> None:
            nonlocal number
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
            number += 1

        before: Any = None
        while len(shown) < count:
            kind = rng.choice(KINDS) if shown else "cut"
            new = None
            if kind == "one more" and len(before[1].shapes) < 4:
                new = _one_more(rng, *before)
            if new is None:
                kind = "cut" if kind == "one more" else kind
                new = scenes.render(Random(f"watching/{seed}/{len(shown)}"), SIDE, most=3)
            pixels = _canvas(new[0])
            begin, length, half = number / RATE, 0, 0.5
            if kind in ("fade", "slow fade", "black"):
                length = int(RATE * (rng.uniform(1.5, 3) if kind == "slow fade" else rng.uniform(0.4, 1.2)))
                half = 0.25 if kind == "black" else 0.5
                first, second = _canvas(before[0]).astype(np.float32), pixels.astype(np.float32)
                for step in range(1, length):
                    part = step / length
                    if kind == "black":
                        put(first * (1 - 2 * part) if part < 0.5 else second * (2 * part - 1))
                    else:
                        put(first * (1 - part) + second * part)
            if shown:
                shown[-1] = replace(shown[-1], end=begin, gone=begin + half * length / RATE)
            shown.append(
                Shown(
                    kind=kind,
                    came=begin + (1 - half) * length / RATE,
                    start=number / RATE,
                    end=0.0,
                    gone=0.0,
                    truth=_truth(new[1].shapes),
                    still=answer(pixels),
                )
            )
            for _ in range(int(RATE * rng.uniform(*lengths))):
                put(pixels)
            before = new
        shown[-1] = replace(shown[-1], end=number / RATE, gone=number / RATE)
        container.mux(stream.encode())
    return shown


def read_cues(text: str) -> list[Cue]:
    """The cues of SubRip."""

    def seconds(clock: str) -> float:
        hours, minutes, rest = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))

    return [Cue(seconds(start), seconds(end), words) for start, end, words in _CUE.findall(text)]


def compare(shown: list[Shown], cues: list[Cue]) -> dict[str, Any]:
    """How many scenes were told right, how many were not told, and what was told of scenes that were not there.

    The second is no error of what tells, which can be slower than the scenes; the third is.
    """
    right = as_still = missing = 0
    starts, ends, wrong = [], [], []
    for scene in shown:
        over = [cue for cue in cues if min(cue.end, scene.end) - max(cue.start, scene.start) > _OVERLAP]
        texts = {cue.text for cue in over}
        right += scene.truth in texts
        as_still += scene.still in texts
        missing += not texts & {scene.truth, scene.still}
        wrong += [(cue, scene) for cue in over if cue.text not in (scene.truth, scene.still)]
        for cue in over:
            if cue.text == scene.still:
                starts.append(cue.start - scene.came)
                ends.append(cue.end - scene.gone)
    return {
        "scenes": len(shown),
        "cues": len(cues),
        "right": right,
        "as the model says of the still": as_still,
        "missing": missing,
        "the model's own errors on stills": sum(scene.truth != scene.still for scene in shown),
        "texts over other scenes": len(wrong),
        **_late("start", starts),
        **_late("end", ends),
        "wrong": [f"{cue} over {scene}" for cue, scene in wrong[:20]],
    }


def _late(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"{name} late, median": round(median(seconds), 2), f"{name} late, most": round(max(seconds), 2)}


@contextmanager
def load(count: int) -> Iterator[None]:
    """Keeps the processors busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in busy:
            each.kill()
            each.wait()


def watch(film: Path, *options: str) -> str:
    """What `fastvlm watch` writes about a film."""
    command = [sys.executable, "-m", "fastvlm_mlx", "watch", str(film), "--model", "demo", "--format", "srt", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout


def main() -> None:
    from fastvlm_mlx import generate
    from fastvlm_mlx import load as load_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=1.5, help="seconds that a scene stands still")
    parser.add_argument("--most", type=float, default=3.5)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the film, its truth and its subtitles")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        film = folder / "film.mp4"
        network, processor = load_model("demo")
        shown = make(
            film,
            arguments.scenes,
            arguments.seed,
            lambda pixels: generate(network, processor, "Describe the image.", pixels, max_tokens=80).text,
            (arguments.least, arguments.most),
        )
        log = folder / "log.jsonl"
        began = time.monotonic()
        with load(arguments.load):
            text = watch(film, *(("--live", "--log", str(log)) if arguments.live else ()))
            busy = os.getloadavg()[0]
        took = time.monotonic() - began
        (folder / "film.srt").write_text(text)
        report = compare(shown, read_cues(text))
        report |= {"film": round(shown[-1].gone, 1), "seconds": round(took, 1), "load": round(busy, 1)}
        if arguments.live:
            records = [json.loads(line) for line in log.read_text().splitlines()]
            ages = [each["age"] for each in records if each["shown"]]
            took = [each["seconds"] for each in records]
            report |= {"answer took, median": median(took), "answer took, most": max(took)}
            report |= {"age, median": median(ages), "age, most": max(ages)}
            report |= {"frames dropped": records[-1]["dropped"], "answers out of date": records[-1]["outdated"]}
    wrong = report.pop("wrong")
    sys.stdout.write(json.dumps(report, indent=1) + "\n" + "".join(f"{each}\n" for each in wrong))


if __name__ == "__main__":
    main()
