"""Quantizes a model stage by stage, each layer on the inputs that the quantized layers before it give.

So what an earlier layer lost is part of what a later one sees, and it can make up for some of it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.convert.compare.agreement import Notify, Probes, Reference
from fastvlm_mlx.convert.compare.layerwise import (
    Stage,
    decoder_stages,
    embedding_stage,
    projector_stage,
    splice,
    tower_stages,
)
from fastvlm_mlx.convert.quantize.gptq import Packed, compensated
from fastvlm_mlx.convert.quantize.report import Squares
from fastvlm_mlx.convert.quantize.scheme import Assignment
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM

SEEDS = range(1000, 1032)
"""The rendered pictures to calibrate on, others than those that checkpoints are compared on."""


class Recorder(nn.Module):
    """Stands in for a linear and adds up XᵀX of its inputs.

    Attributes:
        linear: What it stands in for.
        moments: (in, in).
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        inputs = linear.weight.shape[1]
        self.moments: npt.NDArray[np.float64] = np.zeros((inputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        """What the linear gives."""
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.moments += np.array(rows.T @ rows)
        y: mx.array = self.linear(x)
        return y


def compensate(
    folder: Path, assignment: Assignment, pictures: Iterable[Path], notify: Notify
) -> dict[str, tuple[Packed, Squares]]:
    """The quantized linears of a converted checkpoint and what that changed, by path; embedding and head excepted.

    Args:
        folder: The checkpoint.
        assignment: What each layer gets; all affine.
        pictures: To calibrate on, beside the rendered ones.
        notify: Told what is being done.
    """
    probes = Probes.of(FastVLMProcessor.from_folder(folder), pictures, SEEDS)
    answers = Reference.of(folder, probes, notify).answers
    model = load_model(folder, dtype="float32", lazy=True)
    run = _Run(model, assignment, notify)
    visual = [mx.array(picture)[None] for picture in probes.pixels]
    for stage in (*tower_stages(model), projector_stage(model)):
        visual = run(stage, visual)
    embed = embedding_stage(model).run
    states = []
    for prompt, answer, tokens in zip(probes.prompts, answers, visual, strict=True):
        ids = np.concatenate([prompt, answer])
        states.append(splice(ids, embed(mx.array(ids[ids != IMAGE_TOKEN])), tokens))
    for stage in decoder_stages(model):
        states = run(stage, states)
    return run.packed


class _Run:
    """Runs stages on calibration inputs and quantizes their linears.

    Attributes:
        packed: The result so far.
    """

    def __init__(self, model: FastVLM, assignment: Assignment, notify: Notify) -> None:
        self._model, self._assignment, self._notify = model, assignment, notify
        self.packed: dict[str, tuple[Packed, Squares]] = {}

    def __call__(self, stage: Stage, states: list[mx.array]) -> list[mx.array]:
        """The outputs of the stage for the inputs `states`, after its linears have been quantized."""
        paths = [path for path in self._assignment.layers if stage.holds(path)]
        if paths:
            self._notify(f"compensating {stage.name}")
            for path, moments in self._moments(stage, paths, states).items():
                self._quantize(path, moments)
        return _outputs(stage.run, states)

    def _moments(self, stage: Stage, paths: list[str], states: list[mx.array]) -> dict[str, npt.NDArray[np.float64]]:
        recorders = {path: Recorder(module_at(self._model, path)) for path in paths}
        for path, recorder in recorders.items():
            replace_module(self._model, path, recorder)
        _outputs(stage.run, states)
        for path, recorder in recorders.items():
            replace_module(self._model, path, recorder.linear)
        return {path: recorder.moments for path, recorder in recorders.items()}

    def _quantize(self, path: str, moments: npt.NDArray[np.float64]) -> None:
        linear = module_at(self._model, path)
        exact = np.array(linear.weight)
        packed, rounded = compensated(exact, moments, self._assignment.layers[path], self._model.config.dtype)
        self.packed[path] = packed, (float(np.square(rounded - exact).sum()), float(np.square(exact).sum()))
        linear.weight = mx.array(rounded)


def _outputs(run: Callable[[mx.array], mx.array], states: list[mx.array]) -> list[mx.array]:
    outputs = []
    for state in states:
        outputs.append(run(state))
        mx.eval(outputs[-1])
    return outputs


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of the tree."""
    node = root
    for name in path.split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts another module at a path of the tree."""
    parent, _, name = path.rpartition(".")
    node = module_at(root, parent)
    if isinstance(node, list):
        node[int(name)] = module
    else:
        node[name] = module
