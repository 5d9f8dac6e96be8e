"""Checkpoints on disk: from a name to a converted folder, and from a folder to a model and its processor.

A name is a Hub id, an alias, a folder or a `.zip`. What is not in this project's format is converted once, into a cache
folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import compute_dtype, device, mx
from fastvlm_mlx.config import ALIASES, DEMO, ModelConfig, bundled_checkpoint
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.formatting import names
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.device import prepare
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.quantized import quantize_layers
from fastvlm_mlx.streams import load_stream, turn, worker_streams

CACHE_VARIABLE = "FASTVLM_CACHE"
_READERS = 2

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being done."""


def cache_folder() -> Path:
    """Where converted checkpoints are kept: `$FASTVLM_CACHE`, else `fastvlm-mlx` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastvlm-mlx"


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in this project's format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "fastvlm_format" in config


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of the converted checkpoint `name`, converting it into the cache if need be.

    Args:
        name: `demo`, which the package brings along, a Hub id, an alias (`0.5b`, `1.5b`, `7b`), a folder or a `.zip`.
            What exists on disk wins, except over `demo`; a folder of that name is `./demo`.
        revision: Branch, tag or commit of a Hub id.
        notify: Told, in one line, what takes long.
        progress: Told how far it is.

    Raises:
        CheckpointError: If there is no such thing, or it is no FastVLM checkpoint.
        ConversionError: If it cannot be converted.
    """
    bundled = bundled_checkpoint(name)
    path = bundled or Path(name).expanduser()
    source: str | Path
    if path.exists():
        if path.is_dir() and is_converted(path):
            return path
        source = DEMO if bundled else path.resolve()
        key = f"{Path(source).name}-{_fingerprint(path)}"
    else:
        source = ALIASES.get(str(name).lower(), str(name))
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise CheckpointError(
                f"{name}: no such folder or .zip, and neither a Hub id (owner/name) nor one of "
                f"{', '.join((DEMO, *ALIASES))}"
            )
        key = re.sub(r"[^\w.@-]", "_", f"{source}@{revision or 'main'}".replace("/", "--"))
    destination = cache_folder() / key
    if is_converted(destination):
        return destination
    from fastvlm_mlx.convert import convert_checkpoint

    if notify:
        notify(f"converting {source} once, into {destination}")
    destination.parent.mkdir(parents=True, exist_ok=True)
    convert_checkpoint(source, destination, revision=revision, progress=progress)
    return destination


def _fingerprint(path: Path) -> str:
    """A short hash of the names, sizes and times of the files at `path`, by which a changed source is noticed."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(path.resolve()), stats)).encode()).hexdigest()[:12]


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    lazy: bool = False,
) -> tuple[FastVLM, FastVLMProcessor]:
    """The model and the processor of a checkpoint.

    Args:
        name: A Hub id, an alias, a source folder, a `.zip` or a converted folder.
        dtype: `float16`, `bfloat16` or `float32` to compute in; by default what is stored on a GPU, float32 on a CPU.
        revision: Branch, tag or commit of a Hub id.
        notify: Told, in one line, what takes long.
        progress: Told how far a conversion is.
        lazy: See `load_model`.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged.
        ConversionError: If it cannot be converted.
    """
    folder = resolve(name, revision=revision, notify=notify, progress=progress)
    model = load_model(folder, dtype=dtype, lazy=True)
    processor = FastVLMProcessor.from_folder(folder)
    if device() == "cpu" and not lazy:
        processor.tokenizer.start()
        with turn():
            mx.eval(model.parameters())
    return model, processor


def load_model(folder: Path, *, dtype: str | None = None, lazy: bool = False) -> FastVLM:
    """The model in a converted folder.

    On a GPU its weights are mapped, and read when they are first used. A CPU, which computes in another dtype than what
    is stored, reads and casts them here, on as many threads as pay.

    Args:
        folder: Of a converted checkpoint.
        dtype: To compute in; see `load`.
        lazy: Reads the weights when they are first used on a CPU, too.

    Raises:
        CheckpointError: If the weights are missing, damaged or not exactly those that the config asks for.
        ConfigError: If config.json or `dtype` cannot be used.
    """
    config = ModelConfig.from_path(folder)
    if dtype not in (None, "float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype must be float16, bfloat16 or float32, not {dtype!r}")
    with turn():
        model = FastVLM(config)
        target = getattr(mx, dtype) if dtype else compute_dtype(config.dtype)
        streams = worker_streams(_READERS) if device() == "cpu" else [load_stream()]
        weights = _cast_on_streams([read_weights(folder, stream) for stream in streams], streams, target)
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
    """Every tensor from one of several readings of the same files, each about the same bytes, cast on its stream."""
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a converted folder, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as err:
            raise CheckpointError(f"{index}: cannot be read as an index ({err})") from err
        files = [folder / name for name in listed]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: {names(missing)} missing; the checkpoint is incomplete")
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors in it")
    return files


def read_weights(folder: Path, stream: mx.Stream | None = None) -> dict[str, mx.array]:
    """Every tensor of a converted folder, read on `stream` when first used.

    Raises:
        CheckpointError: If a file is missing, truncated or no safetensors file.
    """
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        _check_length(file)
        try:
            arrays: Any = mx.load(str(file), stream=stream)
        except (RuntimeError, ValueError) as err:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({err})") from err
        weights.update(arrays)
    return weights


def _check_length(file: Path) -> None:
    """Notices a truncated file before its tensors are read as noise."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(start)) if start < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: damaged, its header cannot be read; convert or download it again")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + start + end != size:
        raise CheckpointError(
            f"{file}: {size} bytes, but its header speaks of {8 + start + end}; it is truncated or damaged"
        )
