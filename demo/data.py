"""Batches of scenes for training the demo checkpoint: images, questions as tokens, and targets of the extra heads.

Nothing here knows the network. `train.py` draws the batches in several processes.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Value
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from scenes import CHARACTERS, COLOURS, KINDS, SHAPES, SIZES, WORDS, Scene, ask, render
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

VOCABULARY = 640
RESOLUTION = 192
RANKS = 5
"""Number of shapes of an image whose order from left to right is a target, counted from the left."""
CELL = 32
"""Side in pixels of a cell of the object heads: half a visual token."""
SLOTS = 5
"""Longest printed text."""
ASKED = (*KINDS, "count", "colour", "shape", "where", "where", "exists", "compare")
"""The kinds of questions about a training image, shuffled; as many are used as fit into `TOKENS`."""
TOKENS = 177
"""Most tokens of the questions about an image; with prompt and visual tokens, the length is a multiple of eight."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PROMPT_END = "<|im_end|>\n<|im_start|>assistant\n"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Tokenizer


def train_tokenizer() -> Tokenizer:
    """Returns a byte-level BPE tokenizer like Qwen2's, trained on the questions and answers of 500 scenes."""
    rng = Random("corpus")
    corpus = [*("You are a helpful assistant.", "system", "user", "assistant") * 1000, *WORDS * 400]
    for _ in range(500):
        _, scene = render(rng, 64)
        for kind in ASKED:
            question = ask(scene, rng, kind)
            if question is not None:
                corpus += [question.question, question.answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def load_tokenizer(run: Path) -> Tokenizer:
    """Returns the run's tokenizer, which is trained on first use."""
    path = run / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


# Data


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, and the position in the text where each one ends."""

    ids: list[int]
    ends: list[int]

    @classmethod
    def of(cls, encoding: Encoding) -> Tokens:
        """Returns the tokens of an encoded text."""
        return cls(encoding.ids, [end for _, end in encoding.offsets])


Encode = Callable[[str], Tokens]
Known = tuple[int, int, int]
"""Of a named shape: x and y of its centre from the middle of the image, in 1/256 of a cell, and its size."""
NOTHING: Known = (-1, -1, -1)


def square(image: Image.Image, resolution: int) -> np.ndarray:
    """Returns the image as FastVLM sees it: centred on a black square, bicubic, uint8 (R, R, 3)."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != resolution:
        canvas = canvas.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(canvas)


@dataclass
class Batch:
    """Images with their questions, and the targets of the extra heads.

    Attributes:
        pixels: uint8 (B, R, R, 3).
        ids: token ids after the image (B, T), all questions about an image one after another.
        segments: (B, T), the number of the question that a token belongs to, from 1; 0 is padding.
        offsets: (B, T), position within the question.
        labels: (B, T), the token to predict there, or -1.
        weights: (B, T), weight of that prediction.
        kinds: (B, T), index into `KINDS`.
        cells: (B, G, G, 6): shape, colour, size, the centre's x and y within the cell, in 1/256, and the number of
            shapes further left, or -1 from `RANKS` on; all -1 in a cell without a shape.
        characters: (B, R/16, R/8): 0 or 1 + the index of the character centred there.
        referents: (B, T, 3), where a question or an answer has just named a shape: x and y of its centre from the
            middle of the image, in 1/256 of a cell, and its size; elsewhere -1.
        upcoming: (B, T, 3), the same for the shape that the answer names next.
        slots: (B, R/64, R/64, SLOTS), the characters of a text at the visual token in its middle; elsewhere -1.
        text_ids: (B, N, SLOTS), the token ids of the text at that visual token, padded with -1.
    """

    pixels: Tensor
    ids: Tensor
    segments: Tensor
    offsets: Tensor
    labels: Tensor
    weights: Tensor
    kinds: Tensor
    referents: Tensor
    upcoming: Tensor
    cells: Tensor
    characters: Tensor
    slots: Tensor
    text_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def dense_targets(scene: Scene, resolution: int, encode: Encode) -> dict[str, np.ndarray]:
    """Returns the targets of the extra heads for a scene; see `Batch`."""
    longer = max(scene.width, scene.height)
    left, top = (longer - scene.width) // 2, (longer - scene.height) // 2
    scale = resolution / longer
    grid = resolution // CELL
    cells = np.full((grid, grid, 6), -1, np.int64)
    for rank, shape in enumerate(scene.shapes):
        x, y = (shape.x + left) * scale / CELL, (shape.y + top) * scale / CELL
        column, row = min(int(x), grid - 1), min(int(y), grid - 1)
        cells[row, column] = (
            SHAPES.index(shape.shape),
            [*COLOURS].index(shape.colour),
            [*SIZES].index(shape.size),
            int(256 * (x - column)),
            int(256 * (y - row)),
            rank if rank < RANKS else -1,
        )
    characters = np.zeros((resolution // 16, resolution // 8), np.int64)
    slots = np.full((resolution // 64, resolution // 64, SLOTS), -1, np.int64)
    text_ids = np.full_like(slots, -1)
    for text in scene.texts:
        indices = [1 + CHARACTERS.index(character) for character in text.text]
        for index, (x, y) in zip(indices, text.centres, strict=True):
            characters[int((y + top) * scale) // 16, int((x + left) * scale) // 8] = index
        x, y = (sum(centre) / len(indices) for centre in zip(*text.centres, strict=True))
        row, column = int((y + top) * scale) // 64, int((x + left) * scale) // 64
        slots[row, column] = np.pad(indices, (0, SLOTS - len(indices)))
        ids = encode(text.text).ids
        text_ids[row, column, : len(ids)] = ids
    return {"cells": cells, "characters": characters, "slots": slots, "text_ids": text_ids.reshape(-1, SLOTS)}


PER_TOKEN = {
    "ids": 0,
    "segments": 0,
    "offsets": 0,
    "labels": -1,
    "weights": 0,
    "kinds": 0,
    "referents": -1,
    "upcoming": -1,
}
"""The fields of `Batch` with a value per token, and the value of padding."""
NO_TOKENS = {name: np.zeros((0, 3) if name in ("referents", "upcoming") else 0, np.int64) for name in PER_TOKEN}
"""For images that only the tower learns from."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The first two stages' shares of the training; the third takes the rest."""

    see: float
    answer: float

    def seeing(self, progress: float) -> bool:
        """Returns whether the tower is trained alone; progress goes from 0 to 1."""
        return progress < self.see

    def tuning(self, progress: float) -> bool:
        """Returns whether all parts are trained together."""
        return progress >= self.see + self.answer

    def easy(self, progress: float) -> bool:
        """Returns whether images have only one or two shapes."""
        return progress < self.see + 0.35 * self.answer

    def rate(self, progress: float, peak: float) -> float:
        """Returns the learning rate: a warm-up and a cosine decay in each stage."""
        if self.seeing(progress):
            start, end, height = 0.0, self.see, 1.0
        elif self.tuning(progress):
            start, end, height = self.see + self.answer, 1.0, 0.5
        else:
            start, end, height = self.see, self.see + self.answer, 1.0
        done = min(1.0, (progress - start) / (end - start))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        return height * peak * min(1.0, 0.01 + done / 0.04) * cosine


class Clock:
    """The progress of training from 0 to 1, in steps or in minutes; the processes that draw batches share it.

    Args:
        steps: the number of steps; every run with the same seed and steps draws the same batches.
        minutes: the duration, in place of a number of steps.
    """

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes = steps, minutes
        self.shared = Value("d", 0.0)

    def update(self, steps: int, seconds: float) -> float:
        """Returns the progress after a number of steps and seconds."""
        self.shared.value = steps / self.steps if self.minutes is None else seconds / (60 * self.minutes)
        return self.shared.value

    def at(self, number: int) -> float:
        """Returns the progress when batch `number` is drawn."""
        return number / self.steps if self.minutes is None else self.shared.value


class Scenes(IterableDataset[Batch]):
    """An endless stream of batches; seed, number and progress decide the content of each."""

    def __init__(
        self, tokenizer: Tokenizer, schedule: Schedule, clock: Clock, *, seed: str, batch: int, first: int = 0
    ) -> None:
        self.tokenizer, self.schedule, self.clock = tokenizer, schedule, clock
        self.seed, self.batch, self.first = seed, batch, first

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number in itertools.count(self.first + worker, workers):
            yield self.draw(number, self.clock.at(number))

    def draw(self, number: int, progress: float) -> Batch:
        """Returns training batch `number` at the given progress."""
        rng = Random(f"{self.seed}/{number}")
        # A few larger images, so that the model knows them, too.
        resolution = rng.choices((RESOLUTION, 256), (92, 8))[0]
        seeing, easy, tuning = (
            stage(progress) for stage in (self.schedule.seeing, self.schedule.easy, self.schedule.tuning)
        )
        rows = []
        for _ in range(self.batch):
            longer = resolution if rng.random() < 0.3 else rng.randint(192, 384)
            crowded = seeing and rng.random() < 0.7
            image, scene = render(
                rng,
                longer,
                practice=True,
                crowded=crowded,
                least=rng.choice((1, 1, 1, 4, 4)) if tuning else 1,  # the hardest to describe
                most=rng.randint(1, 2) if easy and not crowded else 5,
            )
            tokens = NO_TOKENS if seeing else self.tokens(scene, rng, resolution, rng.sample(ASKED, len(ASKED)))
            rows.append(self.row(image, scene, resolution, tokens))
        return collate(rows, 0 if seeing else TOKENS)

    def held_out(self, number: int) -> Batch:
        """Returns held-out batch `number`: every kind of question once, on backgrounds that training never shows."""
        rng = Random(f"{self.seed}/{number}")
        rows = []
        for _ in range(self.batch):
            image, scene = render(rng, rng.randint(240, 480), held_out=True)
            rows.append(self.row(image, scene, RESOLUTION, self.tokens(scene, rng, RESOLUTION, KINDS, limit=1000)))
        return collate(rows, max(len(row["ids"]) for row in rows))

    def row(
        self, image: Image.Image, scene: Scene, resolution: int, tokens: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Returns the part of a batch for one image."""
        return {"pixels": square(image, resolution), **dense_targets(scene, resolution, self.encode), **tokens}

    @functools.cached_property
    def encode(self) -> Encode:
        """The tokenizer with a cache, because most questions and answers recur."""
        return functools.lru_cache(50_000)(lambda text: Tokens.of(self.tokenizer.encode(text)))

    def tokens(
        self, scene: Scene, rng: Random, resolution: int, kinds: Sequence[str], limit: int = TOKENS
    ) -> dict[str, np.ndarray]:
        """Returns questions of the given kinds about a scene, as many as fit, one after another; see `Batch`."""
        columns: dict[str, list[object]] = defaultdict(list)
        for segment, kind in enumerate(kinds, 1):
            question = ask(scene, rng, kind)
            if question is None:
                continue
            texts = f"\n{question.question}{PROMPT_END}", question.answer + SPECIAL[2]
            before, answer = (self.encode(text) for text in texts)
            length = len(before.ids) + len(answer.ids) - 1
            if len(columns["ids"]) + length > limit:
                continue
            named = [named_shapes(*pair, scene, resolution) for pair in zip((before, answer), texts, strict=True)]
            last, first = ([*a, *b] for a, b in zip(*named, strict=True))
            # Nobody can know which shape a question will name.
            first[: len(before.ids)] = [NOTHING] * len(before.ids)
            columns["ids"] += (before.ids + answer.ids)[:-1]
            columns["labels"] += [-1] * (len(before.ids) - 1) + answer.ids
            columns["offsets"] += range(length)
            columns["segments"] += [segment] * length
            columns["kinds"] += [KINDS.index(kind)] * length
            columns["weights"] += [len(answer.ids) ** -0.5] * length
            columns["referents"] += last[:length]
            columns["upcoming"] += first[1 : length + 1]
        return {
            name: np.array(column, np.float32 if name == "weights" else np.int64) for name, column in columns.items()
        }


def collate(rows: list[dict[str, np.ndarray]], length: int) -> Batch:
    """Returns a batch whose tokens are padded to `length`, which is constant for the compiler's sake."""
    stacked = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in PER_TOKEN:
            filled = np.full((len(rows), length, *values[0].shape[1:]), PER_TOKEN[name], values[0].dtype)
            for row, value in zip(filled, values, strict=True):
                row[: len(value)] = value
            stacked[name] = filled
        else:
            stacked[name] = np.stack(values)
    return Batch(**{name: torch.from_numpy(value) for name, value in stacked.items()})


def named_shapes(tokens: Tokens, text: str, scene: Scene, resolution: int) -> tuple[list[Known], list[Known]]:
    """Returns place and size of each named shape: at the last token of its name, and at the first."""
    first, last = ([NOTHING] * len(tokens.ids) for _ in range(2))
    longer = max(scene.width, scene.height)
    for shape in scene.shapes:
        for name in (shape.name, shape.chinese):
            start = text.find(name)
            end = start + len(name)
            if start < 0 or end not in tokens.ends:
                continue
            scale = 256 * resolution / CELL / longer
            x, y = int(scale * (shape.x - scene.width / 2)), int(scale * (shape.y - scene.height / 2))
            known = (x, y, [*SIZES].index(shape.size))
            first[bisect.bisect_right(tokens.ends, start)] = known
            last[bisect.bisect_right(tokens.ends, end) - 1] = known
    return last, first
