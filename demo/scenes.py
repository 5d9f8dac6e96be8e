"""Synthetic scenes with questions and answers: the world of the demo checkpoint.

A scene holds one to five coloured shapes and usually a short printed text on some background. Everything follows from
a seed. `python demo/scenes.py --count 2000 --seed 7 --out folder` writes images and a `questions.jsonl` with rows
{"image", "question", "answers", "kind"}, which `fastvlm eval` reads; `--held-out` uses font sizes and backgrounds that
training never shows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 34, 34),
    "orange": (250, 136, 12),
    "yellow": (250, 228, 40),
    "green": (36, 158, 52),
    "blue": (32, 76, 214),
    "purple": (146, 44, 190),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
}
SIZES = {"small": 0.07, "medium": 0.105, "large": 0.155}
"""Radius as a fraction of the longer side."""
WORDS = (
    "APPLE BIRD BOAT BREAD CAKE CAT CLOUD DOG EXIT FIRE FISH FOX GOLD HELLO HOME HOTEL ICE JAZZ KEY LAMP LION MAP MILK "
    "MOON NORTH OPEN PARK PIZZA QUEEN RAIN RIVER ROAD SALE SHIP SNOW STOP SUN TAXI TEA TIME TREE VAN WATER WEST WIND "
    "YES ZERO ZOO"
).split()
CHINESE = dict(
    zip(
        (*SHAPES, *COLOURS),
        "圆形 方形 三角形 星形 十字形 环形 红色 橙色 黄色 绿色 蓝色 紫色 白色 黑色".split(),
        strict=True,
    )
)
KINDS = ("describe", "count", "colour", "shape", "where", "exists", "compare", "read")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono-Bold.ttf", None)
"""File names of matplotlib's fonts; None is the one inside Pillow."""
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape; x, y and radius are in pixels of the image."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, unique within a scene."""
        return f"{self.colour} {self.shape}"

    @property
    def chinese(self) -> str:
        """Colour and shape in Chinese."""
        return f"{CHINESE[self.colour]}的{CHINESE[self.shape]}"


@dataclass(frozen=True, kw_only=True)
class Text:
    """The printed text, its box (left, top, right, bottom) and each character's centre, in pixels."""

    text: str
    box: tuple[float, float, float, float]
    centres: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows: shapes, sorted from left to right, and at most one text (more where it is crowded)."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene and its answer."""

    kind: str
    question: str
    answer: str


# Drawing


@functools.lru_cache(maxsize=64)
def _font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    if name is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), size)


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit circle (y down)."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        spokes = [(0.45 if i % 2 else 1.05, i * math.pi / 5) for i in range(10)]
        return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in spokes]
    a, b = 0.3, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


@functools.lru_cache(maxsize=4096)
def _mask(shape: str, radius: int, degrees: int) -> Image.Image:
    """An antialiased mask of side 2·radius + 3, the shape in its middle."""
    scale = 4
    side = 2 * radius + 3
    centre, r = side * scale / 2, radius * scale
    mask = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((centre - r, centre - r, centre + r, centre + r), fill=255)
        if shape == "ring":
            hole = 0.55 * r
            draw.ellipse((centre - hole, centre - hole, centre + hole, centre + hole), fill=0)
    else:
        sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        draw.polygon(
            [(centre + r * (x * cos - y * sin), centre + r * (x * sin + y * cos)) for x, y in _polygon(shape)], fill=255
        )
    return mask.reduce(scale)


TEXTURE_SIDE = 512


@functools.lru_cache(maxsize=128)
def _texture(seed: int) -> Image.Image:
    """A soft multi-scale texture, like an out-of-focus photograph, 512 pixels square."""
    rng = np.random.default_rng(seed)
    total = np.full((TEXTURE_SIDE, TEXTURE_SIDE, 3), 128.0, np.float32)
    for cells, strength in ((4, 38), (16, 20), (64, 12), (256, 6)):
        noise = rng.normal(0, 1, (cells, cells, 1)) + 0.35 * rng.normal(0, 1, (cells, cells, 3))
        coarse = np.clip(128 + 40 * noise, 0, 255).astype(np.uint8)
        fine = Image.fromarray(coarse).resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(fine, np.float32) - 128) * (strength / 40)
    return Image.fromarray(np.clip(total, 50, 205).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def _noise(seed: int) -> Image.Image:
    """Fine grey-level noise around 128, 512 pixels square."""
    values = np.random.default_rng(seed).normal(128, 14, (TEXTURE_SIDE, TEXTURE_SIDE))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def _muted(rng: Random) -> tuple[int, int, int]:
    """A background colour: mid brightness, low saturation, so that every shape stands out."""
    grey = rng.uniform(75, 185)
    return tuple(int(grey + rng.uniform(-28, 28)) for _ in range(3))


def _crop(rng: Random, texture: Image.Image, width: int, height: int) -> Image.Image:
    x, y = rng.randint(0, TEXTURE_SIDE - width), rng.randint(0, TEXTURE_SIDE - height)
    return texture.crop((x, y, x + width, y + height))


def _background(rng: Random, width: int, height: int, *, held_out: bool, practice: bool) -> Image.Image:
    first, second = (Image.new("RGB", (width, height), _muted(rng)) for _ in range(2))
    more = ("stripes",) * held_out + ("patches",) * practice
    kind = rng.choice(("plain", "gradient", "noise", "texture", *more))
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        return Image.composite(first, second, ramp)
    if kind == "noise":
        return Image.blend(first, _crop(rng, _noise(rng.randrange(4) + 100 * held_out), width, height), 0.5)
    if kind == "texture":
        texture = _crop(rng, _texture(rng.randrange(60) + 1000 * held_out), width, height)
        return Image.blend(first, texture, rng.uniform(0.5, 1.0))
    if kind == "stripes":
        draw = ImageDraw.Draw(first)
        step, colour = rng.randint(16, 40), second.getpixel((0, 0))
        for x in range(0, width, 2 * step):
            draw.rectangle((x, 0, x + step - 1, height), fill=colour)
    if kind == "patches":
        draw = ImageDraw.Draw(first)
        for _ in range(rng.randint(2, 8)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            corners = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 6)))
            side = rng.uniform(0.1, 0.5) * width
            patch = [(x + side * math.cos(corner), y + side * math.sin(corner)) for corner in corners]
            draw.polygon(patch, fill=_muted(rng))
    return first


def _font_size(rng: Random, longer: float, *, held_out: bool) -> int:
    """Font size in pixels: training uses nine ratios to the longer side, held-out images those halfway between."""
    step = rng.randrange(8) + 0.5 if held_out else rng.randrange(9)
    return round(longer * (0.13 + 0.01 * step))


def _place_text(
    rng: Random, image: Image.Image, others: list[Text], *, held_out: bool, practice: bool, zoom: float
) -> Text | None:
    """Prints a word or a number and says where, or does nothing where others are in the way."""
    width, height = image.size
    if rng.random() < (0.3 if practice else 0.55):
        text = rng.choice(WORDS)
    else:
        digits = rng.choice((1, 2, 3, 3, 4, 4, 4) if practice else (1, 2, 3, 4))
        text = str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    name, size = rng.choice(FONTS), _font_size(rng, zoom * max(width, height), held_out=held_out)
    margin = 4
    widest = _font(name, size).getlength(text)
    font = _font(name, min(size, int(size * (width - 4 * margin) / widest)))
    left, top, right, bottom = font.getbbox(text)
    text_width, text_height = right - left, bottom - top
    x = rng.uniform(margin, width - text_width - margin)
    y = rng.uniform(margin, height - text_height - margin)
    x, y = int(x), int(y)
    box = (x, y, x + text_width, y + text_height)
    if any(y - 8 < other.box[3] and other.box[1] < box[3] + 8 for other in others):
        return None
    brightness = image.crop(box).convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    dark = brightness > 150 or (brightness > 105 and rng.random() < 0.5)
    shade = rng.randint(0, 25)
    fill = (shade, shade, shade) if dark else (255 - shade, 255 - shade, 255 - shade)
    ImageDraw.Draw(image).text((x - left, y - top), text, font=font, fill=fill)
    edges = [font.getlength(text[:i]) for i in range(len(text) + 1)]
    centres = tuple((x - left + (a + b) / 2, y + text_height / 2) for a, b in itertools.pairwise(edges))
    return Text(text=text, box=box, centres=centres)


def _choose_kinds(rng: Random) -> list[tuple[str, str]]:
    """Returns one to five different pairs of shape and colour, often with shapes or colours in common."""
    shapes = rng.sample(SHAPES, rng.choice((2, 3, len(SHAPES))))
    colours = rng.sample(tuple(COLOURS), rng.choice((2, 3, len(COLOURS))))
    pairs = [*itertools.product(shapes, colours)]
    return rng.sample(pairs, min(len(pairs), rng.choices((1, 2, 3, 4, 5), (15, 25, 28, 20, 12))[0]))


def _place_shapes(
    rng: Random, size: tuple[int, int], kinds: list[tuple[str, str]], texts: list[Text], zoom: float
) -> list[Shape]:
    width, height = size
    longer = max(size)
    placed: list[Shape] = []
    for shape, colour in kinds:
        name = rng.choice(tuple(SIZES))
        radius = round(longer * zoom * SIZES[name] * rng.uniform(0.94, 1.06))
        for _ in range(40):
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(
                math.hypot(x - s.x, y - s.y) > 0.95 * (radius + s.radius) and abs(x - s.x) > 0.06 * longer
                for s in placed
            ) and all(_distance(x, y, text.box) > radius + 0.01 * longer for text in texts):
                placed.append(Shape(shape=shape, colour=colour, size=name, x=x, y=y, radius=radius))
                break
    return placed


def _distance(x: float, y: float, box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    return math.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom))


def _draw(rng: Random, image: Image.Image, shape: Shape) -> None:
    colour = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[shape.colour])
    mask = _mask(shape.shape, int(shape.radius), 4 * rng.randint(-4, 4))
    half = mask.width / 2
    image.paste(colour, (round(shape.x - half), round(shape.y - half)), mask)


def render(
    rng: Random,
    longer: int,
    *,
    held_out: bool = False,
    practice: bool = False,
    crowded: bool = False,
    least: int = 1,
    most: int = 5,
    zoom: float = 1,
) -> tuple[Image.Image, Scene]:
    """Returns an image and what it shows.

    Args:
        rng: decides everything.
        longer: longer side in pixels; the aspect ratio lies between 1:2 and 2:1.
        held_out: font sizes and backgrounds that training never shows.
        practice: more long numbers, which are the hardest to read, and some backgrounds with edges, for training.
        crowded: as many shapes and texts as fit, the same ones repeated, for learning to see.
        least: the number of shapes at least, for practice with many.
        most: the number of shapes at most, for learning to answer.
        zoom: how large shapes and texts are; below 1 as if seen from further away, above 1 from nearer.
    """
    shorter = longer if rng.random() < 0.3 else round(longer * rng.uniform(0.5, 1))
    width, height = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    while True:
        image = _background(rng, width, height, held_out=held_out, practice=practice)
        texts: list[Text] = []
        for _ in range(4 if crowded else rng.random() < 0.85):
            text = _place_text(rng, image, texts, held_out=held_out, practice=practice, zoom=zoom)
            if text is not None:
                texts.append(text)
        kinds = _choose_kinds(rng)[:most]
        if crowded:
            kinds = [(rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for _ in range(10)]
        shapes = _place_shapes(rng, image.size, kinds, texts, zoom)
        if len(shapes) >= (1 if crowded else least):
            break
    for shape in shapes:
        _draw(rng, image, shape)
    shapes.sort(key=lambda shape: shape.x)
    return image, Scene(width=width, height=height, shapes=tuple(shapes), texts=tuple(texts))


# Questions


def _listing(items: list[str], separator: str, last: str) -> str:
    return items[0] if len(items) == 1 else separator.join(items[:-1]) + last + items[-1]


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _describe(scene: Scene, rng: Random) -> Question:
    if rng.random() < 0.25:
        answer = _listing([shape.chinese for shape in scene.shapes], "、", "和") + "。"
        return Question(kind="describe", question=rng.choice(("描述这张图片。", "图片里有什么?")), answer=answer)
    answer = _listing([_article(shape.name) for shape in scene.shapes], ", ", " and ")
    question = rng.choice(
        (
            "Describe the image.",
            "Describe this picture.",
            "What is in the picture?",
            "What do you see?",
            "Describe the shapes from left to right.",
        )
    )
    return Question(kind="describe", question=question, answer=f"{answer[0].upper()}{answer[1:]}.")


def _count(scene: Scene, rng: Random) -> Question:
    which = rng.random()
    if which < 0.4:
        number, what = len(scene.shapes), "shapes"
    elif which < 0.7:
        wanted = rng.choice(scene.shapes).shape if rng.random() < 0.85 else rng.choice(SHAPES)
        number, what = sum(s.shape == wanted for s in scene.shapes), f"{wanted}{'es' if wanted == 'cross' else 's'}"
    else:
        wanted = rng.choice(scene.shapes).colour if rng.random() < 0.85 else rng.choice(tuple(COLOURS))
        number, what = sum(s.colour == wanted for s in scene.shapes), f"{wanted} shapes"
    question = rng.choice(
        ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the picture?")
    )
    return Question(kind="count", question=question.format(what), answer=str(number))


def _only(scene: Scene, attribute: Callable[[Shape], str]) -> list[Shape]:
    """The shapes whose attribute no other shape of the scene shares."""
    values = [attribute(shape) for shape in scene.shapes]
    return [shape for shape, value in zip(scene.shapes, values, strict=True) if values.count(value) == 1]


def _colour(scene: Scene, rng: Random) -> Question | None:
    candidates = _only(scene, lambda shape: shape.shape)
    if not candidates:
        return None
    shape = rng.choice(candidates)
    question = rng.choice(("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"))
    return Question(kind="colour", question=question.format(shape.shape), answer=shape.colour)


def _shape(scene: Scene, rng: Random) -> Question | None:
    candidates = _only(scene, lambda shape: shape.colour)
    if not candidates:
        return None
    shape = rng.choice(candidates)
    question = rng.choice(("What shape is the {} object?", "Which shape is {}?", "What is the shape of the {} object?"))
    return Question(kind="shape", question=question.format(shape.colour), answer=shape.shape)


def _where(scene: Scene, rng: Random) -> Question | None:
    if len(scene.shapes) < 2:
        return None
    a, b = rng.sample(scene.shapes, 2)
    dx, dy = a.x - b.x, a.y - b.y
    margin = 0.1 * max(scene.width, scene.height)
    choices = []
    if abs(dx) > margin:
        side = "left" if dx < 0 else "right"
        choices.append((f"Is the {a.name} left or right of the {b.name}?", side))
    if abs(dy) > margin:
        side = "above" if dy < 0 else "below"
        choices.append((f"Is the {a.name} above or below the {b.name}?", side))
    larger, smaller = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if larger > margin and larger > 1.5 * smaller:
        side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        choices += [
            (f"Where is the {a.name}, seen from the {b.name}?", side),
            (f"Where is the {a.name} relative to the {b.name}?", side),
        ]
    if not choices:
        return None
    question, answer = rng.choice(choices)
    return Question(kind="where", question=question, answer=answer)


def _exists(scene: Scene, rng: Random) -> Question:
    yes = rng.random() < 0.5
    chinese = rng.random() < 0.25
    if not chinese and rng.random() < 0.1:
        question = rng.choice(("Is there any text?", "Is there text in the picture?"))
        return Question(kind="exists", question=question, answer="no" if not scene.texts else "yes")
    present = {(shape.shape, shape.colour) for shape in scene.shapes}
    if yes:
        wanted = rng.choice(sorted(present))
    else:
        absent = [pair for pair in itertools.product(SHAPES, COLOURS) if pair not in present]
        near = [
            pair
            for pair in absent
            if pair[0] in {shape for shape, _ in present} or pair[1] in {colour for _, colour in present}
        ]
        wanted = rng.choice(near if rng.random() < 0.7 else absent)
    shape, colour = wanted
    if chinese:
        question = rng.choice(("有{}的{}吗?", "图片里有{}的{}吗?")).format(CHINESE[colour], CHINESE[shape])
        return Question(kind="exists", question=question, answer="有" if yes else "没有")
    question = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?"))
    return Question(
        kind="exists", question=question.format(_article(f"{colour} {shape}")), answer="yes" if yes else "no"
    )


def _compare(scene: Scene, rng: Random) -> Question | None:
    pairs = [(a, b) for a, b in itertools.permutations(scene.shapes, 2) if a.size != b.size]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    larger, smaller = (a, b) if a.radius > b.radius else (b, a)
    which = rng.random()
    if which < 0.35:
        question, answer = f"Which is larger, the {a.name} or the {b.name}?", f"the {larger.name}"
    elif which < 0.7:
        question, answer = f"Which is smaller, the {a.name} or the {b.name}?", f"the {smaller.name}"
    elif which < 0.85:
        question, answer = f"Is the {a.name} larger than the {b.name}?", "yes" if a is larger else "no"
    else:
        question, answer = f"Is the {a.name} smaller than the {b.name}?", "yes" if a is smaller else "no"
    return Question(kind="compare", question=question, answer=answer)


def _read(scene: Scene, rng: Random) -> Question | None:
    if not scene.texts:
        return None
    thing = "number" if scene.texts[0].text.isdigit() else "word"
    question = rng.choice(
        ("What does the text say?", "Read the text.", "What is written in the picture?", f"Which {thing} is printed?")
    )
    return Question(kind="read", question=question, answer=scene.texts[0].text)


_ASK: dict[str, Callable[[Scene, Random], Question | None]] = dict(
    zip(KINDS, (_describe, _count, _colour, _shape, _where, _exists, _compare, _read), strict=True)
)


def ask(scene: Scene, rng: Random, kind: str) -> Question | None:
    """Returns a question of this kind about the scene, None where it has no clear answer."""
    return _ASK[kind](scene, rng)


def scene_of(seed: int, index: int, *, held_out: bool) -> tuple[Image.Image, Question]:
    """Returns image and question number `index` of a file; the kinds take turns."""
    rng = Random(f"{seed}/{index}")
    while True:
        image, scene = render(rng, rng.randint(240, 480), held_out=held_out)
        question = ask(scene, rng, KINDS[index % len(KINDS)])
        if question is not None:
            return image, question


def write_questions(out: Path, count: int, seed: int, *, held_out: bool) -> None:
    """Writes `count` images and their `questions.jsonl` into `out`."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    with (out / "questions.jsonl").open("w", encoding="utf-8") as rows:
        for index in range(count):
            image, question = scene_of(seed, index, held_out=held_out)
            name = f"images/{index:05}.png"
            image.save(out / name)
            row = {"image": name, "question": question.question, "answers": [question.answer], "kind": question.kind}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write scenes and questions about them.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", action="store_true", help="font sizes and backgrounds that training never shows")
    arguments = parser.parse_args()
    write_questions(arguments.out, arguments.count, arguments.seed, held_out=arguments.held_out)


if __name__ == "__main__":
    main()
