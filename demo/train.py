"""Trains the demo checkpoint: a tiny FastVLM that answers questions about the scenes of `scenes.py`.

    python demo/train.py --run build/demo --steps 6000          # continues where it stopped
    python demo/train.py --run build/demo --export fastvlm_mlx/demo_model

Each picture is asked a dozen questions at once: they share the visual tokens and see nothing of each other. While it
trains, extra heads on the tower name the shape or character in every cell of the picture; they are dropped at export.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from model import DecoderConfig, FastVLM, TowerConfig
from PIL import Image
from safetensors.torch import save_file
from scenes import CHARACTERS, COLOURS, KINDS, SHAPES, SIZES, WORDS, Scene, ask, render
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

TOWER = TowerConfig(embed_dims=(16, 32, 64, 128, 256), depths=(1, 1, 2, 3, 1), layer_scale=0.2)
DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
)
RESOLUTION = 256
CELL = 32
"""Side in pixels of a cell of the object heads: half a visual token."""
SLOTS = 5
"""Longest printed text."""
ASKED = (*KINDS, "count", "colour", "shape", "where", "where", "exists", "compare")
"""The kinds that a training picture's questions are drawn from, `QUESTIONS` at a time."""
QUESTIONS = 8
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
    corpus = [PROMPT_START, PROMPT_END, *WORDS * 40]
    for _ in range(1500):
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
        cells: (B, G, G, 6): -1 or shape, colour, size, and the centre's x, y within the cell, in 1/256.
        characters: (B, R/16, R/8): 0 or 1 + the index of the character centred there.
        slots: (B, SLOTS): the text, as in `characters`.
        text_token: (B): the visual token at the text's centre, -1 without text.
    """

    pixels: Tensor
    ids: Tensor
    segments: Tensor
    offsets: Tensor
    labels: Tensor
    weights: Tensor
    kinds: Tensor
    cells: Tensor
    characters: Tensor
    slots: Tensor
    text_token: Tensor

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def dense_targets(scene: Scene, resolution: int) -> dict[str, np.ndarray]:
    """Returns what the extra heads shall find in a scene; see `Batch`."""
    longer = max(scene.width, scene.height)
    left, top = (longer - scene.width) // 2, (longer - scene.height) // 2
    scale = resolution / longer
    grid = resolution // CELL
    cells = np.full((grid, grid, 5), -1, np.int64)
    for shape in scene.shapes:
        x, y = (shape.x + left) * scale / CELL, (shape.y + top) * scale / CELL
        column, row = min(int(x), grid - 1), min(int(y), grid - 1)
        cells[row, column] = (
            SHAPES.index(shape.shape),
            [*COLOURS].index(shape.colour),
            [*SIZES].index(shape.size),
            int(256 * (x - column)),
            int(256 * (y - row)),
        )
    characters = np.zeros((resolution // 16, resolution // 8), np.int64)
    slots = np.zeros(SLOTS, np.int64)
    token = -1
    if scene.text is not None:
        for i, (character, (x, y)) in enumerate(zip(scene.text.text, scene.text.centres, strict=True)):
            index = 1 + CHARACTERS.index(character)
            slots[i] = index
            characters[int((y + top) * scale) // 16, int((x + left) * scale) // 8] = index
        x0, y0, x1, y1 = scene.text.box
        column, row = (int((a + offset) * scale / 64) for a, offset in (((x0 + x1) / 2, left), ((y0 + y1) / 2, top)))
        token = row * (resolution // 64) + column
    return {"cells": cells, "characters": characters, "slots": slots, "text_token": np.array(token)}


class Scenes(IterableDataset):
    """An endless stream of batches; batch number n is the same in every run with the same seed."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, batch: int, start: int, steps: int, held_out: bool) -> None:
        self.tokenizer, self.seed, self.batch = tokenizer, seed, batch
        self.start, self.steps, self.held_out = start, steps, held_out

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(self.start + worker, self.steps, workers):
            yield self.make(number)

    def resolution(self, number: int, rng: Random) -> int:
        """Returns the side of the pictures of a batch: smaller ones first, because they are quicker."""
        if self.held_out:
            return RESOLUTION
        early = number < 0.45 * self.steps
        return rng.choices((192, 256, 320), (70, 30, 0) if early else (10, 80, 10))[0]

    def make(self, number: int) -> Batch:
        """Renders batch number `number`."""
        rng = Random(f"{self.seed}/{number}")
        resolution = self.resolution(number, rng)
        samples: dict[str, list[np.ndarray]] = defaultdict(list)
        for _ in range(self.batch):
            longer = resolution if rng.random() < 0.3 else rng.randint(224, 400)
            image, scene = render(rng, longer, held_out=self.held_out)
            samples["pixels"].append(square(image, resolution))
            for name, value in (dense_targets(scene, resolution) | self.tokens(scene, rng)).items():
                samples[name].append(value)
        length = max(len(ids) for ids in samples["ids"])
        for name in ("ids", "segments", "offsets", "labels", "weights", "kinds"):
            fill = -100 if name == "labels" else 0
            samples[name] = [np.pad(row, (0, length - len(row)), constant_values=fill) for row in samples[name]]
        return Batch(**{name: torch.from_numpy(np.stack(rows)) for name, rows in samples.items()})

    def tokens(self, scene: Scene, rng: Random) -> dict[str, np.ndarray]:
        """Returns the questions about a scene, one after the other; see `Batch`."""
        rows: list[tuple[int, int, int, int, float, int]] = []
        kinds = KINDS if self.held_out else rng.sample(ASKED, QUESTIONS)
        for segment, kind in enumerate(kinds, 1):
            question = ask(scene, rng, kind)
            if question is None:
                continue
            before = self.tokenizer.encode(f"\n{question.question}{PROMPT_END}").ids
            answer = self.tokenizer.encode(question.answer + SPECIAL[2]).ids
            ids = before + answer[:-1]
            labels = [-100] * (len(before) - 1) + answer
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
        }


# Model


class DenseHeads(nn.Module):
    """The extra heads: objects from the features and from stage 4, characters from stage 3, the text in a token."""

    outputs = 1 + len(SHAPES) + len(COLOURS) + len(SIZES) + 2

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.objects = nn.ModuleList([nn.Conv2d(dims[3], self.outputs, 1), nn.Conv2d(2 * dims[4], 4 * self.outputs, 1)])
        self.characters = nn.Conv2d(dims[2], 2 * (1 + len(CHARACTERS)), 1)
        self.slots = nn.Linear(2 * dims[4], SLOTS * (1 + len(CHARACTERS)))

    def forward(self, maps: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Returns the losses."""
        features = maps[-1]
        early = self.object_loss(self.objects[0](maps[3]), batch.cells)
        late = self.object_loss(F.pixel_shuffle(self.objects[1](features), 2), batch.cells)
        return {
            "objects": 0.5 * early + late,
            "characters": self.character_loss(maps[2], batch.characters),
            "text": self.text_loss(features, batch),
        }

    def object_loss(self, y: Tensor, cells: Tensor) -> Tensor:
        """Cross-entropies and squared offsets where there is a shape, and whether there is one."""
        y = y.permute(0, 2, 3, 1).float()
        there = cells[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(y[..., 0], there.float(), pos_weight=y.new_tensor(4.0)) * 4
        found, target = y[there], cells[there]
        splits = found[:, 1:].split([len(SHAPES), len(COLOURS), len(SIZES), 2], 1)
        for i, logits in enumerate(splits[:3]):
            loss = loss + F.cross_entropy(logits, target[:, i])
        return loss + 8 * F.mse_loss(splits[3], target[:, 3:] / 256)

    def character_loss(self, x: Tensor, characters: Tensor) -> Tensor:
        """Cross-entropy over the characters plus that over the empty places."""
        logits = self.characters(x).permute(0, 2, 3, 1).reshape(*characters.shape, 1 + len(CHARACTERS)).float()
        losses = F.cross_entropy(logits.flatten(0, 2), characters.flatten(), reduction="none")
        there = characters.flatten() > 0
        return losses[there].sum() / there.sum().clamp(min=1) + 4 * losses[~there].mean()

    def text_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of every character of the text, from the visual token at its centre alone."""
        there = batch.text_token >= 0
        tokens = features.flatten(2).transpose(1, 2)[there, batch.text_token[there]]
        logits = self.slots(tokens).view(-1, SLOTS, 1 + len(CHARACTERS)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.slots[there].flatten())


class Trainee(nn.Module):
    """The model and the heads that training adds to it."""

    def __init__(self, prompt_start: list[int]) -> None:
        super().__init__()
        self.vlm = FastVLM(TOWER, DECODER)
        self.heads = DenseHeads(TOWER.embed_dims)
        self.register_buffer("prompt_start", torch.tensor(prompt_start), persistent=False)
        for name, parameter in self.vlm.model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns hidden states after the image (B, T, D), whose logits predict `labels`, and the heads' losses."""
        pixels = batch.pixels.permute(0, 3, 1, 2).float() / 255
        maps = self.vlm.tower(pixels)
        dense = self.heads(maps, batch)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            visual = self.vlm.project(maps[-1])
            embed = self.vlm.model.embed_tokens
            start = embed(self.prompt_start).expand(len(visual), -1, -1)
            embeds = torch.cat([start.to(visual.dtype), visual, embed(batch.ids).to(visual.dtype)], 1)
            shared = embeds.shape[1] - batch.ids.shape[1]
            positions = torch.arange(shared, device=pixels.device).expand(len(visual), -1)
            positions = torch.cat([positions, shared + batch.offsets], 1)
            segments = F.pad(batch.segments, (shared, 0))
            causal = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool, device=pixels.device).tril()
            same = segments[:, :, None] == segments[:, None, :]
            prefix = torch.arange(embeds.shape[1], device=pixels.device) < shared
            hidden = self.vlm.decode(embeds, positions[:, None], (causal & (same | prefix))[:, None])
        return hidden[:, shared:], dense

    def answer_logits(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns logits (n, V) and labels (n) of the answers' tokens only."""
        answers = batch.labels >= 0
        return self.vlm.logits(hidden[answers].float()), batch.labels[answers]


# Training


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    warm = min(1.0, progress / 0.03)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def accuracy(model: Trainee, batches: list[Batch]) -> dict[str, float]:
    """Returns the share of exactly right answers per kind.

    An answer that the model predicts token by token, given its true beginning, is the answer that greedy decoding finds.
    """
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        hidden, _ = model(batch)
        logits, labels = model.answer_logits(hidden, batch)
        answers = batch.labels >= 0
        questions = batch.segments + 100 * torch.arange(len(batch.ids), device=labels.device)[:, None]
        hits = logits.argmax(-1) == labels
        for question in questions[answers].unique():
            mine = questions[answers] == question
            right[KINDS[int(batch.kinds[answers][mine][0])]].append(bool(hits[mine].all()))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if right[kind]}


def worker_init(_: int) -> None:
    """Lets the renderer stand back behind the trainer."""
    os.nice(10)
    torch.set_num_threads(1)


def train(arguments: argparse.Namespace) -> None:
    """Trains until step `--steps`, from the last saved state if there is one."""
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(run)
    model = Trainee(tokenizer.encode(PROMPT_START).ids).to(device, memory_format=torch.channels_last)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    step = 0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    data = Scenes(
        tokenizer, seed=arguments.seed, batch=arguments.batch, start=step, steps=arguments.steps, held_out=False
    )
    loader = DataLoader(
        data, batch_size=None, num_workers=arguments.workers, prefetch_factor=8, worker_init_fn=worker_init
    )
    held_out = Scenes(tokenizer, seed=-1, batch=32, start=0, steps=arguments.eval_batches, held_out=True)
    batches = [batch.to(device) for batch in held_out]
    sums: dict[str, float] = defaultdict(float)
    started = time.monotonic()
    for step, batch in enumerate(loader, step + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / arguments.steps, arguments.lr)
        model.train()
        batch = batch.to(device)
        hidden, dense = model(batch)
        logits, labels = model.answer_logits(hidden, batch)
        weights = batch.weights[batch.labels >= 0]
        losses = {"answers": (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum(), **dense}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            rate = 1 - min(0.998, step / (step + 100))
            torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], rate)
            for mean, value in zip(averaged.buffers(), model.buffers(), strict=True):
                mean.lerp_(value, rate) if mean.is_floating_point() else mean.copy_(value)
        for name, value in losses.items():
            sums[name] += float(value.detach())
        if step % arguments.log_every == 0 or step == arguments.steps:
            row: dict[str, object] = {"step": step, "seconds": round(time.monotonic() - started, 1)}
            row |= {name: round(value / arguments.log_every, 4) for name, value in sums.items()}
            sums.clear()
            if step % arguments.eval_every == 0 or step == arguments.steps:
                row["accuracy"] = {kind: round(value, 3) for kind, value in accuracy(averaged, batches).items()}
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
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
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
