"""The network in training: the model of `model.py` and the extra heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from data import PROMPT_START, RANKS, RESOLUTION, SLOTS, VOCABULARY, Batch
from model import DecoderConfig, FastVLM, TowerConfig
from scenes import CHARACTERS, COLOURS, SHAPES, SIZES
from tokenizers import Tokenizer
from torch import Tensor, nn

TOWER = TowerConfig(embed_dims=(24, 48, 96, 192, 384), depths=(1, 2, 3, 3, 1), layer_scale=0.2)
DECODER = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=448,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context that computes in bfloat16 on a GPU; many CPUs only emulate it, ten times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def mean_where(there: Tensor, values: Tensor) -> Tensor:
    """Returns the mean of the values where `there` is true, 0 if there are none; it stays on the device."""
    return (values * there).sum() / there.sum().clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of logits (…, C) over the labels (…) that are not -1."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


class DenseHeads(nn.Module):
    """The extra heads: objects from stage 4 and features, characters from stages 3 and 4, texts from features."""

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
        # The decoder has to compare places, so the features give them relative to the middle of the image.
        grid = batch.cells.shape[1]
        order = torch.arange(grid, device=features.device) - grid / 2
        origin = torch.stack(torch.meshgrid(order, order, indexing="xy"), -1).expand(*batch.cells.shape[:3], 2)
        with autocast(features.device):
            early = self.object_loss(self.objects[0](maps[3]), batch.cells, torch.zeros_like(origin))
            late = self.object_loss(F.pixel_shuffle(self.objects[1](features), 2), batch.cells, origin)
            return {
                "objects": 0.5 * early + late,
                "ranks": self.rank_loss(F.pixel_shuffle(self.ranks(features), 2), batch.cells),
                "characters": sum(self.character_loss(i, maps[2 + i], batch.characters) for i in range(2)),
                "text": 2 * self.text_loss(features, batch),
            }

    def object_loss(self, y: Tensor, cells: Tensor, origin: Tensor) -> Tensor:
        """Returns the loss of shape, colour, size and place in cells with a shape, and of whether there is a shape.

        Args:
            y: outputs (B, outputs, G, G).
            cells: targets; see `Batch`.
            origin: (B, G, G, 2), the place of each cell, in cells, which is added to that of a centre within it.
        """
        y = y.permute(0, 2, 3, 1).float()
        there = cells[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(y[..., 0], there.float(), pos_weight=y.new_tensor(4.0)) * 4
        *names, place = y[..., 1:].split([len(SHAPES), len(COLOURS), len(SIZES), 2], -1)
        for i, logits in enumerate(names):
            loss = loss + cross_entropy(logits, cells[..., i])
        distance = (place - cells[..., 3:5] / 256 - origin).square().mean(-1)
        return loss + 8 * mean_where(there, distance)

    def rank_loss(self, y: Tensor, cells: Tensor) -> Tensor:
        """Returns the cross-entropy of the order from left to right, from outputs (B, RANKS, G, G)."""
        return cross_entropy(y.permute(0, 2, 3, 1), cells[..., 5])

    def character_loss(self, head: int, x: Tensor, characters: Tensor) -> Tensor:
        """Returns the cross-entropy over the characters plus a multiple of that over empty places."""
        rows, columns = characters.shape[1] // x.shape[2], characters.shape[2] // x.shape[3]
        y = self.characters[head](x).unflatten(1, (rows, columns, self.characters_out))
        logits = y.permute(0, 4, 1, 5, 2, 3).reshape(*characters.shape, self.characters_out).float()
        losses = F.cross_entropy(logits.flatten(0, 2), characters.flatten(), reduction="none")
        there = characters.flatten() > 0
        return mean_where(there, losses) + 4 * mean_where(~there, losses)

    def text_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Returns the cross-entropy of all characters of a text, from the visual token in its middle alone."""
        logits = self.slots(features.permute(0, 2, 3, 1)).unflatten(-1, (SLOTS, self.characters_out))
        return cross_entropy(logits, batch.slots)


class ReferentHeads(nn.Module):
    """Predict place and size of a shape that a text names, from the decoder's hidden states after some layers.

    To compare two shapes, the decoder first has to find both; to list shapes, it has to find each one before it says
    its name. With a loss for exactly this, it learns both much sooner.
    """

    layers = (1, 2)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, 2 + len(SIZES)) for _ in self.layers)

    def forward(self, states: list[Tensor], referents: Tensor) -> Tensor:
        """Returns the loss, from each layer's states (B, T, D) of tokens after the image and `referents` (B, T, 3)."""
        named = referents[..., 2] >= 0
        loss = states[0].new_zeros((), dtype=torch.float32)
        for layer, head in zip(self.layers, self.heads, strict=True):
            y = head(states[layer].float())
            distance = (y[..., :2] - referents[..., :2] / 256).square().mean(-1)
            loss = loss + mean_where(named, distance) + cross_entropy(y[..., 2:], referents[..., 2])
        return loss


class Trainee(nn.Module):
    """The model and the extra heads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.vlm = FastVLM(TOWER, DECODER)
        self.heads = DenseHeads(TOWER.embed_dims)
        self.referents = ReferentHeads(DECODER.hidden_size)
        self.upcoming = ReferentHeads(DECODER.hidden_size)
        self.native_tower: Callable[[Tensor], list[Tensor]] = self.vlm.tower.forward
        prompt_start = torch.tensor(tokenizer.encode(PROMPT_START).ids)
        self.register_buffer("prompt_start", prompt_start, persistent=False)
        names = torch.zeros(len(SHAPES) + len(COLOURS), VOCABULARY)
        for row, name in enumerate((*SHAPES, *COLOURS)):
            names[row, tokenizer.encode(name).ids + tokenizer.encode(f" {name}").ids] = 1
        self.register_buffer("names", names, persistent=False)
        for name, parameter in self.vlm.model.named_parameters():
            if parameter.ndim == 2 and "vision_tower" not in name:
                # Small where a layer writes into the residual stream, so that tokens stay recognisable in it.
                writes = any(part in name for part in ("o_proj", "down_proj", "mm_projector.2"))
                std = 0.1 if "embed" in name else (0.3 if writes else 1.0) * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def see(self, batch: Batch) -> list[Tensor]:
        """Returns the tower's feature maps of the images."""
        pixels = batch.pixels.permute(0, 3, 1, 2).float() / 255  # channels last, which is faster on CPUs
        with autocast(pixels.device):
            return (self.native_tower if batch.pixels.shape[1] == RESOLUTION else self.vlm.tower)(pixels)

    def answer(self, features: Tensor, batch: Batch) -> list[Tensor]:
        """Returns every layer's hidden states (B, T, D) after the image; the logits of the last predict `labels`."""
        with autocast(features.device):
            visual = self.vlm.project(features).float()
            embed = self.vlm.model.embed_tokens
            start = embed(self.prompt_start).expand(len(visual), -1, -1)
            embeds = torch.cat([start, visual, embed(batch.ids)], 1)
            length, shared = embeds.shape[1], embeds.shape[1] - batch.ids.shape[1]
            order = torch.arange(length, device=features.device)
            positions = torch.cat([order[:shared].expand(len(visual), -1), shared + batch.offsets], 1)
            segments = F.pad(batch.segments, (shared, 0))
            same = segments[:, :, None] == segments[:, None, :]
            allowed = (order[:, None] >= order) & (same | (order < shared))
            mask = torch.zeros_like(allowed, dtype=visual.dtype).masked_fill_(~allowed, -torch.inf)
            return [state[:, shared:] for state in self.vlm.decode(embeds, positions[:, None], mask[:, None])]

    def naming_loss(self, features: Tensor, batch: Batch) -> Tensor:
        """Returns the cross-entropy of the words for what each visual token shows, predicted from the token itself.

        The token is treated like a hidden state. So visual tokens resemble the embeddings of the words for what they
        show, and the decoder can find a word in the image by similarity.
        """
        shapes, colours = batch.cells[..., 0], batch.cells[..., 1] + len(SHAPES)
        words = torch.where((shapes >= 0)[..., None], self.names[shapes] + self.names[colours], 0)
        b, rows, columns, _ = words.shape
        words = words.view(b, rows // 2, 2, columns // 2, 2, -1).sum((2, 4)).flatten(1, 2)
        words = words.scatter_add(2, batch.text_ids.clamp(min=0), 2.0 * (batch.text_ids >= 0))
        count = words.sum(-1)
        likelihood = self.vlm.logits(self.vlm.project(features.float())).log_softmax(-1)
        losses = -(words * likelihood).sum(-1)
        return mean_where(count > 0, losses / count.clamp(min=1))

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (B, T, V) in float32, even where the decoder computes in bfloat16."""
        return self.vlm.logits(hidden.float())
