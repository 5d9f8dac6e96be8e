"""How far two checkpoints agree on the same pictures and prompts: visual tokens, and what comes next in an answer.

One of them, the reference, answers greedily; the other one is asked, at every position of these answers, how likely it
finds each token. As long as both find the same token likeliest, that is also the answer it would have given itself.

Shapes: B samples, R resolution, N visual tokens, T positions of an answer, L of a prompt, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.convert.compare.layerwise import embedding_stage, splice
from fastvlm_mlx.convert.fold.operations import Array
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.language import Qwen2

ANSWER = 10
"""Positions of each answer that are compared."""

SCENES = 5
"""How many rendered pictures checkpoints are compared on, beside the user's."""

RESOLUTION = 192
"""Pixels per side: enough for every kind of layer to have its part, and a full-size tower done in a second."""

PROMPTS = (
    "Describe the image.",
    "What is written in the image?",
    "How many objects are there, and which colours do they have?",
    "What is in the middle of the image?",
)

_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Probes:
    """What two checkpoints are asked.

    Attributes:
        pixels: (B, R, R, 3) in [0, 1].
        prompts: The token ids (T,) of each, one of them `IMAGE_TOKEN`.
    """

    pixels: Array
    prompts: tuple[npt.NDArray[np.int32], ...]

    @classmethod
    def of(
        cls, processor: FastVLMProcessor, pictures: Iterable[Path] = (), seeds: Iterable[int] = range(SCENES)
    ) -> "Probes":
        """Rendered pictures and those of the user, each with one of `PROMPTS`.

        Raises:
            ImageError: If a picture cannot be read.
        """
        photographs = [preprocess(load_image(path), RESOLUTION).astype(np.float32) / 255 for path in pictures]
        pixels = np.stack([*map(scene, seeds), *photographs])
        prompts = [
            np.array(processor.encode(PROMPTS[number % len(PROMPTS)], n_images=1), np.int32)
            for number in range(len(pixels))
        ]
        return cls(pixels=pixels, prompts=tuple(prompts))


def scene(seed: int) -> Array:
    """Coloured shapes and a text on a background of two colours, (R, R, 3) in [0, 1]."""
    random = np.random.default_rng(seed)
    side = RESOLUTION
    colours = random.integers(0, 256, (16, 3))
    ramp = np.linspace(0, 1, side)[:, None, None]
    grain = random.normal(0, random.uniform(0, 8), (side, side, 3))
    picture = np.clip(colours[0] * (1 - ramp) + colours[1] * ramp + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(picture))
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


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The pictures that `paths` name, those of a folder in the order of their names.

    Raises:
        ConversionError: If one does not exist, or a folder holds no picture.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise ConversionError(f"{path}: no such picture or folder of calibration pictures")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        if not found:
            raise ConversionError(f"{path}: holds no picture to calibrate on ({', '.join(sorted(_IMAGES))})")
        files += found
    return files


@dataclass(frozen=True)
class Reference:
    """What the reference gave.

    Attributes:
        visual: Visual tokens (B, N, D).
        answers: Token ids (B, T).
        counted: Which positions (B, T) are compared: those up to the end of each answer.
        logits: (B, T, V).
    """

    visual: Array
    answers: npt.NDArray[np.int32]
    counted: npt.NDArray[np.bool_]
    logits: Array

    @classmethod
    def of(cls, folder: Path, probes: Probes, notify: Notify, length: int = ANSWER) -> "Reference":
        """Runs the converted checkpoint in `folder`, the decoder's weights being read when the tower's are gone."""
        notify("reference: pictures")
        visual = _evaluated(load_model(folder, lazy=True).encode_image(probes.pixels))
        mx.clear_cache()
        notify("reference: answers")
        model = load_model(folder, lazy=True)
        decoder = model.language_model
        embedded, padding = _prompts(model, probes, mx.array(visual))
        cache = decoder.make_cache(padding)
        step = decoder.prefill(embedded, cache)
        logits, answers = [], []
        for number in range(length):
            notify(f"reference: token {number + 1} of {length}")
            tokens = mx.argmax(step, axis=-1)
            logits.append(_evaluated(step))
            answers.append(np.array(tokens))
            if number < length - 1:
                step = decoder(tokens[:, None], cache)[:, -1]
        ids = np.stack(answers, axis=1)
        ended = np.isin(ids, model.config.eos_token_id)
        counted: npt.NDArray[np.bool_] = np.cumsum(ended, axis=1) - ended == 0
        return cls(visual=visual, answers=ids, counted=counted, logits=np.stack(logits, axis=1))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a checkpoint agrees with a reference.

    Attributes:
        positions: How many next-token distributions were compared.
        visual_cosine: Mean cosine similarity of the visual tokens.
        kl: Mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats.
        top1: Share of the positions at which both find the same token likeliest.
        top5: Share of the reference's five likeliest tokens that are among the checkpoint's.
        greedy: Share of the reference's answers that comes before the first token that differs.
    """

    positions: int
    visual_cosine: float
    kl: float
    top1: float
    top5: float
    greedy: float

    @classmethod
    def of(cls, model: FastVLM, probes: Probes, reference: Reference) -> "Agreement":
        """Compares a checkpoint with the reference."""
        visual = model.encode_image(probes.pixels)
        logits = _answer_logits(model, probes, visual, reference.answers)
        counted = reference.counted
        mine, theirs = logits[counted], reference.logits[counted]
        same = np.argmax(logits, axis=-1) == np.argmax(reference.logits, axis=-1)
        before = np.cumprod(same | ~counted, axis=1, dtype=np.bool_) & counted
        return cls(
            positions=int(counted.sum()),
            visual_cosine=float(np.mean(_cosines(_evaluated(visual), reference.visual))),
            kl=float(np.mean(divergences(theirs, mine))),
            top1=float(np.mean(same[counted])),
            top5=float(np.mean([np.isin(a, b).mean() for a, b in zip(_top(theirs), _top(mine), strict=True)])),
            greedy=float(before.sum() / counted.sum()),
        )


def _evaluated(value: mx.array) -> Array:
    return np.array(value.astype(mx.float32))


def _prompts(model: FastVLM, probes: Probes, visual: mx.array) -> tuple[mx.array, list[int] | None]:
    """Embeddings (B, L, D), padded on the left, and the padding of each row if there is any."""
    embed = embedding_stage(model).run
    rows = [
        splice(ids, embed(mx.array(ids[ids != IMAGE_TOKEN])), picture[None])[0]
        for ids, picture in zip(probes.prompts, visual, strict=True)
    ]
    length = max(len(row) for row in rows)
    padding = [length - len(row) for row in rows]
    padded = [mx.pad(row, [(left, 0), (0, 0)]) for row, left in zip(rows, padding, strict=True)]
    return mx.stack(padded), padding if any(padding) else None


def _answer_logits(model: FastVLM, probes: Probes, visual: mx.array, answers: npt.NDArray[np.int32]) -> Array:
    """The logits (B, T, V) at every position of given answers, in one pass."""
    decoder: Qwen2 = model.language_model
    embedded, padding = _prompts(model, probes, visual)
    following = embedding_stage(model).run(mx.array(answers[:, :-1]))
    length = answers.shape[1]
    hidden = decoder.model(None, decoder.make_cache(padding), mx.concatenate([embedded, following], axis=1))
    return _evaluated(decoder.head(hidden[:, -length:]))


def _cosines(first: Array, second: Array) -> Array:
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosines: Array = (first * second).sum(axis=-1) / np.maximum(norms, 1e-30)
    return cosines


def divergences(reference: Array, other: Array) -> Array:
    """KL divergences (positions,) between the softmaxes of logits (positions, V)."""
    p, q = (mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True) for logits in (reference, other))
    return np.maximum(np.array((mx.exp(p) * (p - q)).sum(axis=-1)), 0)


def _top(logits: Array, count: int = 5) -> npt.NDArray[np.intp]:
    return np.argpartition(-logits, count, axis=-1)[..., :count]
