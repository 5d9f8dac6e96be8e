"""Bits per layer by what they are worth: how far the next-token distributions move when one layer alone is quantized.

Each layer is quantized by itself at a few bits, and the rest of the model is run from there. Rounding errors are small
and independent, so that their effects on the divergence add up, and each further bit quarters them; then the bits go
where a byte buys the most.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.convert.compare.agreement import Notify, Probes, divergences
from fastvlm_mlx.convert.compare.layerwise import (
    EMBEDDING,
    Stage,
    decoder_stages,
    embedding_stage,
    head_stage,
    projector_stage,
    splice,
    tower_stages,
)
from fastvlm_mlx.convert.fold.operations import Array
from fastvlm_mlx.convert.quantize.calibrated import module_at
from fastvlm_mlx.convert.quantize.scheme import AUTO_BITS, Assignment
from fastvlm_mlx.model.fastvlm import FastVLM

MEASURED_BITS = 4
_SAMPLES = 2
_FLOOR = 1e-9
"""Divergence, in nats, below which a layer's effect is noise."""


def allot(folder: Path, assignment: Assignment, target: float, probes: Probes, notify: Notify) -> Assignment:
    """The assignment with bits per layer that come to at most `target` bits per weight over the layers it quantizes.

    Args:
        folder: The converted checkpoint.
        assignment: What it starts from.
        target: Bits per weight, scales included.
        probes: What to measure on.
        notify: Told what is being done.
    """
    sizes = {path: int(np.prod(assignment.shapes[path])) for path in assignment.layers}
    budget = target * sum(sizes.values())
    effects = sensitivities(load_model(folder, dtype="float32", lazy=True), assignment, probes, notify)

    def cost(path: str, bits: int) -> float:
        per_weight: float = replace(assignment.layers[path], bits=bits).bits_per_weight
        return per_weight * sizes[path]

    chosen = dict.fromkeys(sizes, AUTO_BITS[0])
    spent = sum(cost(path, bits) for path, bits in chosen.items())
    open_layers = set(chosen)
    while open_layers:
        gains = {}
        for path in open_layers:
            bits = chosen[path]
            following = AUTO_BITS[AUTO_BITS.index(bits) + 1]
            gain = effects[path] * (4.0 ** (MEASURED_BITS - bits) - 4.0 ** (MEASURED_BITS - following))
            gains[path] = gain / (cost(path, following) - cost(path, bits))
        best = max(gains, key=lambda path: gains[path])
        following = AUTO_BITS[AUTO_BITS.index(chosen[best]) + 1]
        extra = cost(best, following) - cost(best, chosen[best])
        if spent + extra > budget:
            open_layers.discard(best)
            continue
        chosen[best], spent = following, spent + extra
        if following == AUTO_BITS[-1]:
            open_layers.discard(best)
    layers = {path: replace(assignment.layers[path], bits=bits) for path, bits in chosen.items()}
    return replace(assignment, layers=layers)


def sensitivities(model: FastVLM, assignment: Assignment, probes: Probes, notify: Notify) -> Mapping[str, float]:
    """The divergence, in nats, that `MEASURED_BITS` for one layer alone cause, by path."""
    return _Measurement(model, assignment, probes, notify).effects


class _Measurement:
    """Runs the exact model once, and from every layer on again with that layer quantized.

    Attributes:
        effects: The result.
    """

    def __init__(self, model: FastVLM, assignment: Assignment, probes: Probes, notify: Notify) -> None:
        self._model, self._assignment, self._notify = model, assignment, notify
        self._prompts = probes.prompts[:_SAMPLES]
        self.effects: dict[str, float] = {}
        tower = [*tower_stages(model), projector_stage(model)]
        decoder = [*decoder_stages(model), head_stage(model)]
        pictures = [mx.array(picture)[None] for picture in probes.pixels[:_SAMPLES]]
        visual = _run(tower, pictures)
        self._exact = _logits(_run(decoder, self._spliced(visual)))
        for number, stage in enumerate(tower):
            for path in self._layers(stage):
                with self._quantized(path):
                    moved = _run(tower[number:], pictures)
                self._record(path, _run(decoder, self._spliced(moved)))
            pictures = _run([stage], pictures)
        states = self._spliced(visual)
        if EMBEDDING in assignment.layers:
            with self._quantized(EMBEDDING):
                self._record(EMBEDDING, _run(decoder, self._spliced(visual)))
        for number, stage in enumerate(decoder):
            for path in self._layers(stage):
                with self._quantized(path):
                    self._record(path, _run(decoder[number:], states))
            states = _run([stage], states)

    def _layers(self, stage: Stage) -> list[str]:
        return [path for path in self._assignment.layers if stage.holds(path) and path != EMBEDDING]

    @contextmanager
    def _quantized(self, path: str) -> Iterator[None]:
        self._notify(f"measuring {path}")
        layer, group_size = module_at(self._model, path), self._assignment.layers[path].group_size
        exact = layer.weight
        layer.weight = mx.dequantize(*mx.quantize(exact, group_size, MEASURED_BITS), group_size, MEASURED_BITS)
        yield
        layer.weight = exact

    def _record(self, path: str, states: list[mx.array]) -> None:
        self.effects[path] = max(_FLOOR, float(np.mean(divergences(self._exact, _logits(states)))))

    def _spliced(self, visual: list[mx.array]) -> list[mx.array]:
        embed = embedding_stage(self._model).run
        return [
            splice(ids, embed(mx.array(ids[ids != IMAGE_TOKEN])), tokens)
            for ids, tokens in zip(self._prompts, visual, strict=True)
        ]


def _run(stages: Iterable[Stage], states: list[mx.array]) -> list[mx.array]:
    for stage in stages:
        states = [stage.run(state) for state in states]
        mx.eval(states)
    return states


def _logits(states: list[mx.array]) -> Array:
    """(positions, V) of all samples; after the prompt's last token and those before it."""
    return np.concatenate([np.array(state[0]) for state in states])
