"""Loads the model in a converted folder: config.json and tensors, strictly."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.arguments import choice
from fastvlm_mlx.backend import compute_dtype, device, mx
from fastvlm_mlx.checkpoint import fusing
from fastvlm_mlx.checkpoint.casting import cast_on_streams
from fastvlm_mlx.checkpoint.first_pass import first_pass
from fastvlm_mlx.checkpoint.folder import checked_files, read_files
from fastvlm_mlx.checkpoint.slices import read_slices
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.model.device import check_compiler, prepare
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.quantized import quantize_layers
from fastvlm_mlx.model.sharding import connect, narrow
from fastvlm_mlx.streams import load_stream, turn, worker_streams

_READERS = 2
_DECODER = "language_model."


def load_model(
    folder: Path,
    *,
    dtype: str | mx.Dtype | None = None,
    lazy: bool = False,
    in_parts: bool = False,
    group: mx.distributed.Group | None = None,
) -> FastVLM:
    """The model in a converted folder.

    On a GPU the weights are read when they are first used. A CPU computes in another type than the stored one, so there
    they are read and cast here, on several threads.

    Args:
        folder: A converted checkpoint.
        dtype: The type to compute in; see `load`.
        lazy: Whether to read the weights when they are first used on a CPU, too.
        in_parts: Whether each projection of the decoder is a layer of its own, by upstream's name, and none is fused.
        group: The processes that each load a part of the decoder; see `fastvlm_mlx.model.sharding`.

    Raises:
        CheckpointError: If the weights are missing, damaged or not exactly those that the config describes.
        ConfigError: If config.json or `dtype` cannot be used.
    """
    name = dtype_name(dtype)
    config = ModelConfig.from_path(folder)
    with turn():
        target = getattr(mx, name) if name else compute_dtype(config.dtype)
        streams = worker_streams(_READERS) if device() == "cpu" else [load_stream()]
        if device() == "cpu":
            check_compiler()
        files = checked_files(folder)
        if group is None:
            weights = cast_on_streams([read_files(files, stream) for stream in streams], streams, target)
        else:
            weights = read_slices(folder, config, group.rank(), group.size(), target)
        _check_depths(folder, weights, config)
        weights = fusing.in_parts(weights, config.text_config) if in_parts else fusing.fused(weights, config, streams)
        model = FastVLM(config)
        model.language_model.split(path.removeprefix(_DECODER) for path in fusing.stored_in_parts(weights))
        if group is not None:
            narrow(model, group.rank(), group.size())
        if config.quantization:
            quantize_layers(model, config.quantization, weights)
        _check(folder, weights, dict(_flat(model.parameters())))
        model.update(tree_unflatten(list(weights.items())))
        model.eval()
        prepare(model)
        if group is not None:
            connect(model, group)
        if device() == "cpu" and not lazy:
            read_parameters(model, folder)
        elif device() == "cpu" and group is None and not (in_parts or config.quantization):
            model.language_model.first_pass = first_pass(model.language_model, files, config, streams[0])
    return model


def read_parameters(model: FastVLM, folder: Path) -> None:
    """Reads the weights of a model that have not been read yet.

    Raises:
        CheckpointError: If that is not possible, because a file has changed since.
    """
    model.language_model.first_pass = None
    try:
        mx.eval(model.parameters())
    except RuntimeError as err:
        raise CheckpointError(f"{printable(folder)}: its weights cannot be read: {printable(err)}") from err


def dtype_name(dtype: str | mx.Dtype | None) -> str | None:
    """The name of a type to compute in; None is none.

    Raises:
        ConfigError: If there is no such type.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("mlx.core.") if isinstance(dtype, mx.Dtype) else dtype
    return choice(name, "dtype", ("float16", "bfloat16", "float32"))


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(tree)
    return list(leaves)


def _check_depths(folder: Path, weights: Iterable[str], config: ModelConfig) -> None:
    """Compares the numbers of layers and blocks with the tensors', before modules are built for each."""
    text, vision = config.text_config, config.vision_config
    expected = {"language_model.model.layers.": text.num_hidden_layers} | {
        f"vision_tower.stages.{stage}.blocks.": depth for stage, depth in enumerate(vision.depths)
    }
    stored: dict[str, set[str]] = {prefix: set() for prefix in expected}
    for name in weights:
        for prefix in expected:
            if name.startswith(prefix):
                stored[prefix].add(name.removeprefix(prefix).partition(".")[0])
    for prefix, count in expected.items():
        if len(stored[prefix]) != count:
            raise CheckpointError(
                f"{printable(folder)}: config.json says {count} {prefix}#, the tensors have {len(stored[prefix])}; "
                "convert the checkpoint again"
            )


def _check(folder: Path, weights: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """Checks that the tensors are exactly the model's parameters, in name, kind and shape."""
    label = printable(folder)
    problems = {
        "lacks": sorted(expected.keys() - weights.keys()),
        "has unknown tensors": sorted(weights.keys() - expected.keys()),
    }
    for what, absent in problems.items():
        if absent:
            raise CheckpointError(f"{label}: {what} {names(absent)}; convert the checkpoint again")
    for name, parameter in expected.items():
        stored = weights[name]
        if stored.shape != parameter.shape:
            raise CheckpointError(
                f"{label}: {name} has shape {stored.shape}, expected {parameter.shape}; convert it again"
            )
        floating = mx.issubdtype(parameter.dtype, mx.floating)
        if not (mx.issubdtype(stored.dtype, mx.floating) if floating else stored.dtype == parameter.dtype):
            kind = "a floating-point type" if floating else _name(parameter.dtype)
            raise CheckpointError(f"{label}: {name} is {_name(stored.dtype)}, expected {kind}; convert it again")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
