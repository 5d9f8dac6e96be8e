"""Trains the demo checkpoint: a tiny FastVLM that answers questions about the scenes of `scenes.py`.

    torchrun --nproc-per-node 2 demo/train.py --run build/demo --compile     # continues where it stopped
    python demo/train.py --run build/demo --export fastvlm_mlx/demo_model

Three stages, as FastVLM's own training has them: first the tower learns to see, alone, with extra heads that name the
shape or character in every cell of crowded pictures; then projector and decoder learn to answer from the frozen tower;
at last everything is tuned together. Each picture is asked several questions at once: they share the visual tokens and
see nothing of each other. The extra heads are dropped at export.
The checkpoint is in train-time form under Apple's names (see `model.py`), so that it takes the way of any checkpoint
through the converter.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import DecoderConfig, FastVLM, TowerConfig
from PIL import Image
from safetensors.torch import save_file
from scenes import CHARACTERS, COLOURS, KINDS, SHAPES, SIZES, WORDS, Scene, ask, render
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

TOWER = TowerConfig(embed_dims=(16, 32, 64, 128, 256), depths=(1, 1, 2, 3, 1), layer_scale=0.2)
DECODER = DecoderConfig(
    vocab_size=640,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
)
RESOLUTION = 192
RANKS = 5
"""Most shapes of a picture whose order from left to right is told."""
CELL = 32
"""Side in pixels of a cell of the object heads: half a visual token."""
SLOTS = 5
"""Longest printed text."""
ASKED = (*KINDS, "count", "colour", "shape", "where", "where", "exists", "compare")
"""The kinds that a training picture's questions are drawn from, as many as fit into `TOKENS`."""
TOKENS = 176
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PROMPT_END = "<|im_end|>\n<|im_start|>assistant\n"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Tokenizer


def train_tokenizer() -> Tokenizer:
    """Returns a byte-level BPE tokenizer as Qwen2's, made from the questions and answers of a few hundred scenes."""
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
        vocab_size=DECODER.vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


# Data


def square(image: Image.Image, resolution: int) -> np.ndarray:
    """Returns the picture as FastVLM sees it: centred on a black square, bicubic, uint8 (R, R, 3)."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != resolution:
        canvas = canvas.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(canvas)


@dataclass
class Batch:
    """Pictures with their questions, and what the extra heads shall find.

    Attributes:
        pixels: uint8 (B, R, R, 3).
        ids: token ids after the image (B, T), all questions of a picture in a row.
        segments: (B, T), the number of the question each token belongs to, from 1; 0 is padding.
        offsets: (B, T), position within the question.
        labels: (B, T), the token to predict there or -100.
        weights: (B, T), weight of that prediction.
        kinds: (B, T), index into `KINDS`.
        cells: (B, G, G, 6): -1 or shape, colour, size, the centre's x, y within the cell, in 1/256, and how many shapes
            are further left, -1 where that is more than `RANKS`.
        characters: (B, R/16, R/8): 0 or 1 + the index of the character centred there.
        referents: (B, T, 3), where a question or an answer has just named a shape: its centre's x, y from the middle of
            the picture, in 1/256 of a cell, and its size; elsewhere -1.
        upcoming: (B, T, 3), the same of the shape that is named next.
        slots: (B, R/64, R/64, SLOTS): at the visual token in the middle of a text its characters, elsewhere -1.
        text_ids: (B, N, SLOTS): there the token ids of the text, padded with -1.
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


def dense_targets(scene: Scene, resolution: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Returns what the extra heads shall find in a scene; see `Batch`."""
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
        ids = tokenizer.encode(text.text).ids
        text_ids[row, column, : len(ids)] = ids
    return {"cells": cells, "characters": characters, "slots": slots, "text_ids": text_ids.reshape(-1, SLOTS)}


PER_TOKEN = ("ids", "segments", "offsets", "labels", "weights", "kinds", "referents", "upcoming")
NO_TOKENS = {name: np.zeros((0, 3) if name in ("referents", "upcoming") else 0, np.int64) for name in PER_TOKEN}
"""For the pictures that only the tower learns from."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps each stage takes."""

    see: int
    answer: int
    both: int

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.see + self.answer + self.both

    def rate(self, step: int, peak: float) -> float:
        """Returns the learning rate of a step (from 1): in each stage a warm-up, then a cosine."""
        for steps, share in ((self.see, 1.0), (self.answer, 1.0), (self.both, 0.5)):
            if step <= steps:
                progress = step / steps
                cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
                return share * peak * min(1.0, progress / 0.04) * cosine
            step -= steps
        raise ValueError("past the last step")


class Scenes(IterableDataset):
    """An endless stream of batches; batch number n is the same in every run with the same seed."""

    def __init__(
        self, tokenizer: Tokenizer, schedule: Schedule, *, seed: str, batch: int, numbers: range, held_out: bool
    ) -> None:
        self.tokenizer, self.schedule = tokenizer, schedule
        self.seed, self.batch, self.numbers, self.held_out = seed, batch, numbers, held_out

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number in self.numbers[worker::workers]:
            yield self.make(number)

    def resolution(self, rng: Random) -> int:
        """Returns the side of the pictures of a batch; a few larger ones, so that these are not unheard of."""
        return RESOLUTION if self.held_out else rng.choices((RESOLUTION, 256), (92, 8))[0]

    def make(self, number: int) -> Batch:
        """Renders batch number `number`."""
        rng = Random(f"{self.seed}/{number}")
        resolution = self.resolution(rng)
        samples: dict[str, list[np.ndarray]] = defaultdict(list)
        seeing = not self.held_out and number < self.schedule.see
        for _ in range(self.batch):
            longer = resolution if rng.random() < 0.3 else rng.randint(192, 384)
            crowded = seeing and rng.random() < 0.7
            easy = not self.held_out and number < self.schedule.see + 0.35 * self.schedule.answer
            most = rng.randint(1, 2) if easy and not crowded else 5
            tuning = not self.held_out and number >= self.schedule.see + self.schedule.answer
            least = rng.choice((1, 1, 1, 4, 4)) if tuning else 1  # the hardest to describe
            image, scene = render(rng, longer, held_out=self.held_out, crowded=crowded, least=least, most=most)
            samples["pixels"].append(square(image, resolution))
            targets = dense_targets(scene, resolution, self.tokenizer)
            targets |= NO_TOKENS if seeing else self.tokens(scene, rng, resolution)
            for name, value in targets.items():
                samples[name].append(value)
        longest = max(len(ids) for ids in samples["ids"])
        length = longest if seeing or self.held_out else TOKENS  # always the same, for the compiler
        for name in PER_TOKEN:
            fill = {"labels": -100, "referents": -1, "upcoming": -1}.get(name, 0)
            samples[name] = [
                np.pad(row, [(0, length - len(row)), (0, 0)][: row.ndim], constant_values=fill) for row in samples[name]
            ]
        return Batch(**{name: torch.from_numpy(np.stack(rows)) for name, rows in samples.items()})

    def tokens(self, scene: Scene, rng: Random, resolution: int) -> dict[str, np.ndarray]:
        """Returns the questions about a scene, one after the other; see `Batch`."""
        rows: list[tuple[int, int, int, int, float, int]] = []
        referents: list[np.ndarray] = []
        upcoming: list[np.ndarray] = []
        kinds = KINDS if self.held_out else rng.sample(ASKED, len(ASKED))
        for segment, kind in enumerate(kinds, 1):
            question = ask(scene, rng, kind)
            if question is None:
                continue
            texts = f"\n{question.question}{PROMPT_END}", question.answer + SPECIAL[2]
            encodings = [self.tokenizer.encode(text) for text in texts]
            before, answer = (encoding.ids for encoding in encodings)
            ids = before + answer[:-1]
            if len(rows) + len(ids) > TOKENS and not self.held_out:
                continue
            labels = [-100] * (len(before) - 1) + answer
            named = [named_shapes(*pair, scene, resolution) for pair in zip(encodings, texts, strict=True)]
            last, first = (np.concatenate(ends) for ends in zip(*named, strict=True))
            referents.append(last[: len(ids)])
            first[: len(before)] = -1  # what a question is going to name cannot be known
            upcoming.append(first[1 : len(ids) + 1])
            weight = len(answer) ** -0.5
            for offset, (token, label) in enumerate(zip(ids, labels, strict=True)):
                rows.append((token, segment, offset, label, weight, KINDS.index(kind)))
        ids, segments, offsets, labels, weights, index = (np.array(column) for column in zip(*rows, strict=True))
        return {
            "ids": ids,
            "segments": segments,
            "offsets": offsets,
            "labels": labels,
            "weights": weights.astype(np.float32),
            "kinds": index,
            "referents": np.concatenate(referents),
            "upcoming": np.concatenate(upcoming),
        }


def named_shapes(encoding: Encoding, text: str, scene: Scene, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns place and size (T, 3) of each shape that a text names, at its name's last token and at its first."""
    first, last = (np.full((len(encoding.ids), 3), -1, np.int64) for _ in range(2))
    longer = max(scene.width, scene.height)
    for shape in scene.shapes:
        for name in (shape.name, shape.chinese):
            start = text.find(name)
            tokens = [i for i, (a, b) in enumerate(encoding.offsets) if b > start and a < start + len(name)]
            if start < 0 or encoding.offsets[tokens[-1]][1] != start + len(name):
                continue
            x, y = (shape.x - scene.width / 2) / longer, (shape.y - scene.height / 2) / longer
            known = (*(int(256 * side * resolution / CELL) for side in (x, y)), [*SIZES].index(shape.size))
            first[tokens[0]] = last[tokens[-1]] = known
    return last, first


# Model


class DenseHeads(nn.Module):
    """The extra heads: objects from stage 4 and the features, characters from stages 3 and 4, texts from features."""

    outputs = 1 + len(SHAPES) + len(COLOURS) + len(SIZES) + 2
    characters_out = 1 + len(CHARACTERS)

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.objects = nn.ModuleList([nn.Conv2d(dims[3], self.outputs, 1), nn.Conv2d(2 * dims[4], 4 * self.outputs, 1)])
        self.characters = nn.ModuleList(
            [nn.Conv2d(dims[2], 2 * self.characters_out, 1), nn.Conv2d(dims[3], 8 * self.characters_out, 1)]
        )
        self.slots = nn.Linear(2 * dims[4], SLOTS * self.characters_out)
        self.ranks = nn.Conv2d(2 * dims[4], 4 * RANKS, 1)

    def forward(self, maps: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Returns the losses."""
        features = maps[-1]
        # The decoder has to compare places, so the features tell them from the middle of the picture.
        grid = batch.cells.shape[1]
        order = torch.arange(grid, device=features.device) - grid / 2
        origin = torch.stack(torch.meshgrid(order, order, indexing="xy"), -1).expand(*batch.cells.shape[:3], 2)
        early = self.object_loss(self.objects[0](maps[3]), batch.cells, torch.zeros_like(origin))
        late = self.object_loss(F.pixel_shuffle(self.objects[1](features), 2), batch.cells, origin)
        return {
            "objects": 0.5 * early + late,
            "ranks": self.rank_loss(F.pixel_shuffle(self.ranks(features), 2), batch.cells),
            "characters": sum(self.character_loss(i, maps[2 + i], batch.characters) for i in range(2)),
            "text": 2 * self.text_loss(features, batch),
        }

    def object_loss(self, y: Tensor, cells: Tensor, origin: Tensor) -> Tensor:
        """Cross-entropies and squared distances where there is a shape, and whether there is one.

        Args:
            y: outputs (B, outputs, G, G).
            cells: see `Batch`.
            origin: (B, G, G, 2), what is added to a centre's place within its cell, in cells.
        """
        y = y.permute(0, 2, 3, 1).float()
        there = cells[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(y[..., 0], there.float(), pos_weight=y.new_tensor(4.0)) * 4
        found, target = y[there], cells[there]
        splits = found[:, 1:].split([len(SHAPES), len(COLOURS), len(SIZES), 2], 1)
        for i, logits in enumerate(splits[:3]):
            loss = loss + F.cross_entropy(logits, target[:, i])
        return loss + 8 * F.mse_loss(splits[3], target[:, 3:5] / 256 + origin[there])

    def rank_loss(self, y: Tensor, cells: Tensor) -> Tensor:
        """Cross-entropy of the order from left to right, of outputs (B, RANKS, G, G)."""
        there = cells[..., 0] >= 0
        return F.cross_entropy(y.permute(0, 2, 3, 1)[there].float(), cells[there][:, 5], ignore_index=-1)

    def character_loss(self, head: int, x: Tensor, characters: Tensor) -> Tensor:
        """Cross-entropy over the characters plus that over the empty places."""
        rows, columns = characters.shape[1] // x.shape[2], characters.shape[2] // x.shape[3]
        y = self.characters[head](x).unflatten(1, (rows, columns, self.characters_out))
        logits = y.permute(0, 4, 1, 5, 2, 3).reshape(*characters.shape, self.characters_out).float()
        losses = F.cross_entropy(logits.flatten(0, 2), characters.flatten(), reduction="none")
        there = characters.flatten() > 0
        return losses[there].sum() / there.sum().clamp(min=1) + 4 * losses[~there].mean()

    def text_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of every character of the text, from the visual token at its centre alone."""
        there = batch.slots[..., 0] >= 0
        logits = self.slots(features.permute(0, 2, 3, 1)[there]).view(-1, SLOTS, self.characters_out).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.slots[there].flatten())


class ReferentHeads(nn.Module):
    """Tell, from the decoder's states after some layers, where a shape is that is being named, and its size.

    To compare two shapes, the decoder has first to find each; to list them, it has to find the next one before it says
    its name. Asked for that directly, it learns both much sooner.
    """

    layers = (1, 2)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, 2 + len(SIZES)) for _ in self.layers)

    def forward(self, states: list[Tensor], referents: Tensor) -> Tensor:
        """Returns the loss, from the states (B, T, D) of the tokens after the image and `referents` (B, T, 3)."""
        named = referents[..., 2] >= 0
        target = referents[named]
        loss = states[0].new_zeros((), dtype=torch.float32)
        for layer, head in zip(self.layers, self.heads, strict=True):
            y = head(states[layer][named].float())
            loss = loss + F.mse_loss(y[:, :2], target[:, :2] / 256) + F.cross_entropy(y[:, 2:], target[:, 2])
        return loss


class Trainee(nn.Module):
    """The model and the heads that training adds to it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.vlm = FastVLM(TOWER, DECODER)
        self.heads = DenseHeads(TOWER.embed_dims)
        self.referents = ReferentHeads(DECODER.hidden_size)
        self.upcoming = ReferentHeads(DECODER.hidden_size)
        self.native_tower: Callable[[Tensor], list[Tensor]] = self.vlm.tower.forward
        prompt_start = torch.tensor(tokenizer.encode(PROMPT_START).ids)
        self.register_buffer("prompt_start", prompt_start, persistent=False)
        names = torch.zeros(len(SHAPES) + len(COLOURS), DECODER.vocab_size)
        for row, name in enumerate((*SHAPES, *COLOURS)):
            names[row, tokenizer.encode(name).ids + tokenizer.encode(f" {name}").ids] = 1
        self.register_buffer("names", names, persistent=False)
        for name, parameter in self.vlm.model.named_parameters():
            if parameter.ndim == 2 and "vision_tower" not in name:
                # Small where a layer writes into the residual stream: tokens should stay recognisable in it.
                writes = any(part in name for part in ("o_proj", "down_proj", "mm_projector.2"))
                std = 0.1 if "embed" in name else (0.3 if writes else 1.0) * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def see(self, batch: Batch) -> list[Tensor]:
        """Returns the tower's maps of the pictures."""
        pixels = batch.pixels.permute(0, 3, 1, 2).float() / 255
        return (self.native_tower if batch.pixels.shape[1] == RESOLUTION else self.vlm.tower)(pixels)

    def answer(self, features: Tensor, batch: Batch) -> list[Tensor]:
        """Returns every layer's hidden states after the image (B, T, D); the last ones' logits predict `labels`."""
        # CPUs without bfloat16 arithmetic emulate it, ten times slower.
        with torch.autocast(features.device.type, torch.bfloat16, enabled=features.is_cuda):
            visual = self.vlm.project(features)
            embed = self.vlm.model.embed_tokens
            start = embed(self.prompt_start).expand(len(visual), -1, -1)
            embeds = torch.cat([start.to(visual.dtype), visual, embed(batch.ids).to(visual.dtype)], 1)
            length, shared = embeds.shape[1], embeds.shape[1] - batch.ids.shape[1]
            order = torch.arange(length, device=features.device)
            positions = torch.cat([order[:shared].expand(len(visual), -1), shared + batch.offsets], 1)
            segments = F.pad(batch.segments, (shared, 0))
            same = segments[:, :, None] == segments[:, None, :]
            allowed = (order[:, None] >= order) & (same | (order < shared))
            mask = torch.zeros_like(allowed, dtype=visual.dtype).masked_fill_(~allowed, -torch.inf)
            return [state[:, shared:] for state in self.vlm.decode(embeds, positions[:, None], mask[:, None])]

    def naming_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the words for what a visual token shows, read off the token as off a hidden state.

        It puts the projector's output into the decoder's vocabulary, so that looking a word up in the picture is a
        matter of likeness.
        """
        shapes, colours = batch.cells[..., 0], batch.cells[..., 1] + len(SHAPES)
        words = torch.where((shapes >= 0)[..., None], self.names[shapes] + self.names[colours], 0)
        b, rows, columns, _ = words.shape
        words = words.view(b, rows // 2, 2, columns // 2, 2, -1).sum((2, 4)).flatten(1, 2)
        words = words.scatter_add(2, batch.text_ids.clamp(min=0), 2.0 * (batch.text_ids >= 0))
        shown = words.sum(-1) > 0
        logits = self.vlm.logits(self.vlm.project(features)[shown])
        return F.cross_entropy(logits, words[shown] / words[shown].sum(-1, keepdim=True))

    def answer_logits(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns logits (n, V) and labels (n) of the answers' tokens only."""
        answers = batch.labels >= 0
        return self.vlm.logits(hidden[answers].float()), batch.labels[answers]


# Training


@torch.no_grad()
def accuracy(model: Trainee, batches: list[Batch]) -> dict[str, float]:
    """Returns the share of exactly right answers per kind.

    An answer whose every token is the likeliest one after the true beginning is the answer that greedy decoding finds.
    """
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        hidden = model.answer(model.see(batch)[-1], batch)[-1]
        logits, labels = model.answer_logits(hidden, batch)
        answers = batch.labels >= 0
        questions = batch.segments + 100 * torch.arange(len(batch.ids), device=labels.device)[:, None]
        hits = logits.argmax(-1) == labels
        for question in questions[answers].unique():
            mine = questions[answers] == question
            right[KINDS[int(batch.kinds[answers][mine][0])]].append(bool(hits[mine].all()))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if right[kind]}


@torch.no_grad()
def sight(model: Trainee, batches: list[Batch]) -> dict[str, float]:
    """Returns the extra heads' losses on held-out pictures."""
    model.eval()
    losses = [model.heads(model.see(batch), batch) for batch in batches]
    return {name: sum(float(loss[name]) for loss in losses) / len(losses) for name in losses[0]}


def worker_init(_: int) -> None:
    """Lets the renderer stand back behind the trainer."""
    os.nice(10)
    torch.set_num_threads(1)


def losses_of(model: Trainee, batch: Batch, *, seeing: bool, frozen: bool) -> dict[str, Tensor]:
    """Returns the losses of a training step.

    Args:
        model: in training mode.
        batch: pictures and questions.
        seeing: train the tower alone.
        frozen: leave the tower as it is.
    """
    model.train()
    if not seeing:
        model.vlm.tower.eval()
    with torch.set_grad_enabled(not frozen):
        maps = model.see(batch)
        losses = {} if frozen else model.heads(maps, batch)
    if not seeing:
        states = model.answer(maps[-1], batch)
        logits, labels = model.answer_logits(states[-1], batch)
        weights = batch.weights[batch.labels >= 0]
        answers = F.cross_entropy(logits, labels, reduction="none")
        losses["answers"] = 4 * (answers * weights).sum() / weights.sum()
        losses["naming"] = model.naming_loss(maps[-1], batch)
        losses["referents"] = model.referents(states, batch.referents)
        losses["upcoming"] = model.upcoming(states, batch.upcoming)
    return losses


def share_gradients(model: nn.Module, ranks: int) -> None:
    """Replaces the gradients by their mean over all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(arguments: argparse.Namespace) -> None:
    """Trains to the end of the schedule, from the last saved state if there is one."""
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = Schedule(see=arguments.see, answer=arguments.answer, both=arguments.both)
    tokenizer = load_tokenizer(run)
    model = Trainee(tokenizer).to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(model).requires_grad_(False)
    if arguments.compile:
        model.native_tower = torch.compile(model.vlm.tower.forward, dynamic=False)
        model.vlm.decode = torch.compile(model.vlm.decode, dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    done = 0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    data = Scenes(
        tokenizer,
        schedule,
        seed=f"{arguments.seed}" if rank == 0 else f"{arguments.seed}/{rank}",
        batch=arguments.batch,
        numbers=range(done, schedule.steps),
        held_out=False,
    )
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=8 if arguments.workers else None,
        worker_init_fn=worker_init,
    )
    held_out = Scenes(tokenizer, schedule, seed="-1", batch=32, numbers=range(arguments.eval_batches), held_out=True)
    batches = [batch.to(device) for batch in held_out]
    sums: dict[str, float] = defaultdict(float)
    started = time.monotonic()
    for step, batch in enumerate(loader, done + 1):
        seeing = step <= schedule.see
        if step == schedule.see + 1:
            model.vlm.tower.load_state_dict(averaged.vlm.tower.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, arguments.lr)
        frozen = schedule.see < step <= schedule.see + schedule.answer
        losses = losses_of(model, batch.to(device), seeing=seeing, frozen=frozen)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if ranks > 1:
            share_gradients(model, ranks)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.998, step / (step + 100))
            torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - keep)
            for mean, value in zip(averaged.buffers(), model.buffers(), strict=True):
                mean.lerp_(value, 1 - keep) if mean.is_floating_point() else mean.copy_(value)
        for name, value in losses.items():
            sums[name] += float(value.detach())
        if step % arguments.log_every == 0 and rank == 0:
            row: dict[str, object] = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            row |= {name: round(value / arguments.log_every, 4) for name, value in sums.items()}
            sums.clear()
            if step % arguments.eval_every == 0 or step in (schedule.see, schedule.steps):
                results = sight(averaged, batches) if seeing else accuracy(averaged, batches)
                row["held_out"] = {name: round(value, 3) for name, value in results.items()}
                state = {
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                torch.save(state, run / "state.tmp")
                (run / "state.tmp").replace(run / "state.pt")
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")


# Files


def load_tokenizer(run: Path) -> Tokenizer:
    """Returns the run's tokenizer, made on first use."""
    path = run / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def export(run: Path, out: Path) -> None:
    """Writes the averaged weights in Apple's train-time layout, float16, with the tokenizer's files."""
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "state.pt", map_location="cpu")["averaged"]
    weights = {name.removeprefix("vlm."): value for name, value in state.items() if name.startswith("vlm.")}
    half = {
        name: value.half().contiguous() if value.is_floating_point() else value.clone()
        for name, value in weights.items()
    }
    save_file(half, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors keeps it to its owner
    tokenizer = load_tokenizer(run)
    tokenizer.model.save(str(out))
    added = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    for name, content in (
        ("added_tokens.json", added),
        ("tokenizer_config.json", tokenizer_config(added)),
        ("config.json", checkpoint_config(added)),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def tokenizer_config(added: dict[str, int]) -> dict[str, object]:
    """Returns `tokenizer_config.json` with the fields of Qwen2's."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in added.items()},
        "additional_special_tokens": [SPECIAL[1], SPECIAL[2]],
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "model_max_length": 2048,
        "pad_token": SPECIAL[0],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def checkpoint_config(added: dict[str, int]) -> dict[str, object]:
    """Returns `config.json` with the fields of Apple's checkpoints."""
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "bos_token_id": added[SPECIAL[0]],
        "eos_token_id": added[SPECIAL[2]],
        "hidden_act": "silu",
        "hidden_size": DECODER.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": DECODER.intermediate_size,
        "max_position_embeddings": 2048,
        "mm_hidden_size": 2 * TOWER.embed_dims[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_tower": f"mobileclip_l_{RESOLUTION}",
        "model_type": "llava_qwen2",
        "num_attention_heads": DECODER.num_attention_heads,
        "num_hidden_layers": DECODER.num_hidden_layers,
        "num_key_value_heads": DECODER.num_key_value_heads,
        "rms_norm_eps": DECODER.rms_norm_eps,
        "rope_theta": DECODER.rope_theta,
        "tie_word_embeddings": DECODER.tie_word_embeddings,
        "tokenizer_model_max_length": 2048,
        "torch_dtype": "float16",
        "use_sliding_window": False,
        "vocab_size": DECODER.vocab_size,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train or export the demo checkpoint.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, tokenizer, log")
    parser.add_argument("--export", type=Path, help="write the checkpoint into this folder instead of training")
    parser.add_argument("--see", type=int, default=5000, help="steps of the tower alone")
    parser.add_argument("--answer", type=int, default=6000, help="steps of projector and decoder")
    parser.add_argument("--both", type=int, default=3600, help="steps of everything together")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--compile", action="store_true", help="compile the model: some minutes, then a quarter faster")
    parser.add_argument("--workers", type=int, default=1, help="processes that render scenes")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-batches", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.run, arguments.export)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
