"""Quantizes a model with GPTQ, segment by segment: each layer sees the inputs that quantized layers before it give.

The error of an earlier layer is thus part of a later layer's input, and the later layer can compensate for some of it.
"""

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.convert.arrays import Packed
from fastvlm_mlx.convert.compare.layerwise import Segment, module_at, replace_module, run, segments
from fastvlm_mlx.convert.compare.probes import Probes
from fastvlm_mlx.convert.compare.weights import WeightError
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.convert.quantize.gptq import compensated
from fastvlm_mlx.convert.quantize.scheme import BitAllocation
from fastvlm_mlx.model.fastvlm import FastVLM

Hessians = dict[str, npt.NDArray[np.float64]]


class Recorder(nn.Module):
    """Stands in for a linear and sums XᵀX of its inputs.

    Args:
        linear: The layer that it stands in for.

    Attributes:
        hessian: The sum so far, (in, in).
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        inputs = linear.weight.shape[1]
        self.hessian: npt.NDArray[np.float64] = np.zeros((inputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) -> (…, out), as the linear."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.hessian += np.array(rows.T @ rows)
        y: mx.array = self.linear(x)
        return y


def compensate(
    model: FastVLM, allocation: BitAllocation, probes: Probes, answers: npt.NDArray[np.int32], notify: Notify
) -> dict[str, tuple[Packed, WeightError]]:
    """The quantized linears of a model and their errors, by path; embedding and head are left out.

    Args:
        model: The exact model in float32; its linears are replaced by their dequantized weights.
        allocation: The scheme of each layer; all are affine.
        probes: The images and prompts to calibrate on.
        answers: The token ids (B, T) of the exact model's answers to them.
        notify: Called with the path of each layer before it is quantized.
    """
    parts = segments(model)
    packed: dict[str, tuple[Packed, WeightError]] = {}
    states = [mx.array(image)[None] for image in probes.pixels]
    for segment in parts.vision:
        packed |= _quantize(model, segment, allocation, states, notify)
        states = run([segment], states)
    states = [
        model.embed(np.concatenate([prompt, answer]), visual_tokens=visual)
        for prompt, answer, visual in zip(probes.prompts, answers, states, strict=True)
    ]
    for segment in parts.blocks:
        packed |= _quantize(model, segment, allocation, states, notify)
        states = run([segment], states)
    return packed


def _quantize(
    model: FastVLM, segment: Segment, allocation: BitAllocation, states: list[mx.array], notify: Notify
) -> dict[str, tuple[Packed, WeightError]]:
    """The quantized linears of one segment for its inputs `states`; the model gets their dequantized weights."""
    paths = [path for path in allocation.layers if segment.holds(path)]
    if not paths:
        return {}
    packed = {}
    for path, hessian in _hessians(model, segment, paths, states).items():
        notify(path)
        linear = module_at(model, path)
        exact = np.array(linear.weight, order="C")
        parts, rounded = compensated(exact, hessian, allocation.layers[path], model.config.dtype)
        packed[path] = parts, WeightError(float(np.square(rounded - exact).sum()), float(np.square(exact).sum()))
        linear.weight = mx.array(rounded)
    return packed


def _hessians(model: FastVLM, segment: Segment, paths: list[str], states: list[mx.array]) -> Hessians:
    """XᵀX of the inputs of linears of a segment, by path."""
    recorders = {path: Recorder(module_at(model, path)) for path in paths}
    try:
        for path, recorder in recorders.items():
            replace_module(model, path, recorder)
        run([segment], states)
    finally:
        for path, recorder in recorders.items():
            replace_module(model, path, recorder.linear)
    return {path: recorder.hessian for path, recorder in recorders.items()}
