"""Loads the model in a converted folder: config.json and tensors, strictly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import compute_dtype, device, mx
from fastvlm_mlx.checkpoint.folder import checked_files, read_files
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.formatting import names
from fastvlm_mlx.model.device import prepare
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.quantized import quantize_layers
from fastvlm_mlx.streams import load_stream, turn, worker_streams

_READERS = 2


def load_model(folder: Path, *, dtype: str | None = None, lazy: bool = False) -> FastVLM:
    """The model in a converted folder.

    On a GPU the weights are read when they are first used. A CPU computes in another type than the stored one, so there
    they are read and cast here, on several threads.

    Args:
        folder: A converted checkpoint.
        dtype: The type to compute in; see `load`.
        lazy: Whether to read the weights when they are first used on a CPU, too.

    Raises:
        CheckpointError: If the weights are missing, damaged or not exactly those that the config describes.
        ConfigError: If config.json or `dtype` cannot be used.
    """
    config = ModelConfig.from_path(folder)
    if dtype not in (None, "float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype must be float16, bfloat16 or float32, not {dtype!r}")
    with turn():
        model = FastVLM(config)
        target = getattr(mx, dtype) if dtype else compute_dtype(config.dtype)
        streams = worker_streams(_READERS) if device() == "cpu" else [load_stream()]
        files = checked_files(folder)
        weights = _cast_on_streams([read_files(files, stream) for stream in streams], streams, target)
        if config.quantization:
            quantize_layers(model, config.quantization, weights)
        _check(folder, weights, {name: value.shape for name, value in _flat(model.parameters())})
        model.update(tree_unflatten(list(weights.items())))
        model.eval()
        prepare(model)
        if device() == "cpu" and not lazy:
            mx.eval(model.parameters())
    return model


def _cast_on_streams(
    readings: list[dict[str, mx.array]], streams: Sequence[mx.Stream], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Takes each tensor from one of several readings of the same files, about as many bytes from each, and casts it."""
    weights, sizes = {}, [0] * len(readings)
    for name in readings[0]:
        reader = sizes.index(min(sizes))
        value = readings[reader][name]
        sizes[reader] += value.nbytes
        castable = mx.issubdtype(value.dtype, mx.floating) and value.dtype != dtype
        weights[name] = value.astype(dtype, stream=streams[reader]) if castable else value
    return weights


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(tree)
    return list(leaves)


def _check(folder: Path, weights: dict[str, mx.array], expected: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "lacks": sorted(expected.keys() - weights.keys()),
        "has unknown tensors": sorted(weights.keys() - expected.keys()),
    }
    for what, absent in problems.items():
        if absent:
            raise CheckpointError(f"{folder}: {what} {names(absent)}; convert the checkpoint again")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {weights[name].shape}, expected {shape}; convert it again"
            )
