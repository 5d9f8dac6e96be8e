"""Chooses bits per layer by sensitivity: how far next-token distributions move when one layer alone is quantized.

Each layer is quantized by itself at a few bits, and the rest of the model runs from there. Rounding errors are small
and independent: their effects on the divergence add up, and each further bit quarters them. The bits then go where a
byte buys the most.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.convert.arrays import Array
from fastvlm_mlx.convert.compare.agreement import divergences
from fastvlm_mlx.convert.compare.layerwise import Segment, module_at, run, segments
from fastvlm_mlx.convert.compare.probes import Probes
from fastvlm_mlx.convert.parts import EMBEDDING
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.convert.quantize.scheme import AUTO_BITS, BitAllocation
from fastvlm_mlx.model.fastvlm import FastVLM

MEASURED_BITS = 4
_SAMPLES = 2
_FLOOR = 1e-9
"""The divergence, in nats, below which a layer's effect is noise."""


def allocate_bits(effects: Mapping[str, float], allocation: BitAllocation, target: float) -> BitAllocation:
    """The allocation with at most `target` bits per weight over the layers that it quantizes.

    Args:
        effects: Of every layer, as `sensitivities` measures them.
        allocation: The allocation to start from.
        target: Bits per weight, scales included.
    """
    sizes = {path: allocation.weights(path) for path in allocation.layers}
    budget = target * sum(sizes.values())

    def cost(path: str, bits: int) -> float:
        scheme = replace(allocation.layers[path], bits=bits)
        return float(scheme.bits_per_weight(allocation.scale_bits) * sizes[path])

    chosen = dict.fromkeys(sizes, AUTO_BITS[0])
    spent = sum(cost(path, bits) for path, bits in chosen.items())
    candidates = set(chosen)
    while candidates:
        gains = {}
        for path in candidates:
            bits = chosen[path]
            following = AUTO_BITS[AUTO_BITS.index(bits) + 1]
            gain = effects[path] * (4.0 ** (MEASURED_BITS - bits) - 4.0 ** (MEASURED_BITS - following))
            gains[path] = gain / (cost(path, following) - cost(path, bits))
        best = max(gains, key=lambda path: gains[path])
        following = AUTO_BITS[AUTO_BITS.index(chosen[best]) + 1]
        extra = cost(best, following) - cost(best, chosen[best])
        if spent + extra > budget:
            candidates.discard(best)
            continue
        chosen[best], spent = following, spent + extra
        if following == AUTO_BITS[-1]:
            candidates.discard(best)
    layers = {path: replace(allocation.layers[path], bits=bits) for path, bits in chosen.items()}
    return replace(allocation, layers=layers)


def sensitivities(model: FastVLM, allocation: BitAllocation, probes: Probes, notify: Notify) -> dict[str, float]:
    """The divergence, in nats, that `MEASURED_BITS` for one layer alone cause, by the layer's path.

    Runs the exact model once, and from every layer on again with that layer quantized.

    Args:
        model: The exact model in float32; it is left as it was.
        allocation: The layers and their group sizes.
        probes: The images and prompts to measure on; the first few are used.
        notify: Called with the path of each layer before it is measured.
    """
    parts = segments(model)
    prompts = probes.prompts[:_SAMPLES]
    images = [mx.array(image)[None] for image in probes.pixels[:_SAMPLES]]

    def embedded(visual: list[mx.array]) -> list[mx.array]:
        return [model.embed(ids, visual_tokens=tokens) for ids, tokens in zip(prompts, visual, strict=True)]

    def divergence(states: list[mx.array]) -> float:
        return max(_FLOOR, float(np.mean(divergences(exact, _logits(states)))))

    visual = run(parts.vision, images)
    exact = _logits(run(parts.decoder, embedded(visual)))
    effects = {}
    states = images
    for number, segment in enumerate(parts.vision):
        for path in _layers(allocation, segment):
            with quantized_layer(model, allocation, path, notify):
                moved = run(parts.vision[number:], states)
            effects[path] = divergence(run(parts.decoder, embedded(moved)))
        states = run([segment], states)
    if EMBEDDING in allocation.layers:
        with quantized_layer(model, allocation, EMBEDDING, notify):
            effects[EMBEDDING] = divergence(run(parts.decoder, embedded(visual)))
    states = embedded(visual)
    for number, segment in enumerate(parts.decoder):
        for path in _layers(allocation, segment):
            with quantized_layer(model, allocation, path, notify):
                effects[path] = divergence(run(parts.decoder[number:], states))
        states = run([segment], states)
    return effects


def _layers(allocation: BitAllocation, segment: Segment) -> Sequence[str]:
    """The layers of a segment that are to be quantized, without the embedding, which may belong to two."""
    return [path for path in allocation.layers if segment.holds(path) and path != EMBEDDING]


@contextmanager
def quantized_layer(model: FastVLM, allocation: BitAllocation, path: str, notify: Notify) -> Iterator[None]:
    """Replaces the weights of one layer by quantized ones for the duration of a `with` block."""
    notify(path)
    layer, group_size = module_at(model, path), allocation.layers[path].group_size
    exact = layer.weight
    layer.weight = mx.dequantize(*mx.quantize(exact, group_size, MEASURED_BITS), group_size, MEASURED_BITS)
    try:
        yield
    finally:
        layer.weight = exact


def _logits(states: list[mx.array]) -> Array:
    """(positions, V) of all samples, at every position of their prompts."""
    return np.concatenate([np.array(state[0]) for state in states])
