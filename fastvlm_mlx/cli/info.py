"""`fastvlm info`: this machine, or what a checkpoint holds and needs."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, Revision
from fastvlm_mlx.cli.terminal import ByteProgress, note
from fastvlm_mlx.formatting import readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.config import ModelConfig

PARTS = ("vision_tower", "mm_projector", "language_model")
RESOLUTIONS = (256, 512, 768, 1024, 1536)

TEXT_POSITIONS = 512
"""Positions besides the image that the memory estimate allows for: the prompt and an answer."""

TOWER_MAPS = 7
"""Peak memory of the tower in units of its widest map, (R/4)² x 4·C: 6.1 to 6.7 measured on the CPU backend."""


def info(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show this machine, or a checkpoint.

    Without MODEL: device, memory, BLAS and the converted models in the cache. With MODEL: where it came from, its
    parts, and for each resolution the visual tokens and about the memory that a question takes here.
    """
    record = _machine() if model is None else _checkpoint(model, revision)
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        typer.echo("\n".join(_machine_lines(record) if model is None else _checkpoint_lines(record)))


def _machine() -> dict[str, Any]:
    from fastvlm_mlx import __version__
    from fastvlm_mlx.backend import blas
    from fastvlm_mlx.checkpoint.folder import is_converted
    from fastvlm_mlx.machine import describe
    from fastvlm_mlx.resolve import cache_folder

    cache = cache_folder()
    return {
        "fastvlm_mlx": __version__,
        **asdict(describe()),
        "blas": asdict(blas()),
        "cache": str(cache),
        "cached": {folder.name: _folder_bytes(folder) for folder in sorted(cache.glob("*")) if is_converted(folder)},
    }


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _machine_lines(record: dict[str, Any]) -> Iterator[str]:
    blas = record["blas"]
    yield f"fastvlm-mlx  {record['fastvlm_mlx']}, mlx {record['mlx']}, Python {record['python']}"
    yield f"device       {record['device']}: {record['chip']}, {record['cores']} cores"
    yield f"memory       {readable_bytes(record['memory'])}"
    yield f"system       {record['system']}"
    yield f"BLAS         {blas['name']}" + (f", {blas['threads']} threads" if blas["threads"] else "")
    if blas["hint"]:
        yield f"             faster: {blas['hint']}"
    yield f"cache        {record['cache']}" + ("" if record["cached"] else " (empty)")
    for name, size in record["cached"].items():
        yield f"             {name}, {readable_bytes(size)}"


def _checkpoint(name: str, revision: str | None) -> dict[str, Any]:
    from fastvlm_mlx.checkpoint.folder import read_weights
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.resolve import resolve

    with ByteProgress() as progress:
        folder = resolve(name, revision=revision, notify=note, progress=progress)
    config = ModelConfig.from_path(folder)
    weights = read_weights(folder)
    patch_size = config.vision_config.patch_size
    return {
        "folder": str(folder),
        "source": config.source,
        "dtype": config.dtype,
        "quantization": config.quantization.to_dict() if config.quantization else None,
        "tied_embeddings": config.text_config.tie_word_embeddings,
        "image_size": config.vision_config.image_size,
        "max_length": config.max_length,
        "parts": {part: _part(part, weights, config) for part in PARTS},
        "resolutions": {
            side: {"visual_tokens": (side // patch_size) ** 2, "memory_bytes": _memory_needed(config, weights, side)}
            for side in RESOLUTIONS
        },
    }


def _part(name: str, weights: dict[str, "mx.array"], config: "ModelConfig") -> dict[str, Any]:
    """Parameters, bytes and bits per weight of one part; a quantized layer counts as the weights it stands for."""
    parameters = size = 0
    for path, value in weights.items():
        if not path.startswith(f"{name}."):
            continue
        size += value.nbytes
        layer, _, leaf = path.rpartition(".")
        if f"{layer}.scales" not in weights or leaf == "bias":
            parameters += value.size
        elif leaf == "scales":
            parameters += value.size * _group_size(config, layer)
    return {"parameters": parameters, "size_bytes": size, "bits_per_weight": round(8 * size / parameters, 2)}


def _group_size(config: "ModelConfig", layer: str) -> int:
    """How many weights of a quantized layer share a scale."""
    assert config.quantization is not None
    return config.quantization.for_layer(layer).group_size or 0


def _memory_needed(config: "ModelConfig", weights: dict[str, "mx.array"], resolution: int) -> int:
    """About how many bytes a question about one image takes here: weights, activations of the tower, KV cache."""
    from fastvlm_mlx.backend import compute_dtype, mx

    item = compute_dtype(config.dtype).size
    loaded = sum(w.size * item if mx.issubdtype(w.dtype, mx.floating) else w.nbytes for w in weights.values())
    vision, text = config.vision_config, config.text_config
    widest = (resolution // 4) ** 2 * vision.mlp_ratio * vision.embed_dims[0] * item
    positions = (resolution // vision.patch_size) ** 2 + TEXT_POSITIONS
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * item * positions
    return loaded + TOWER_MAPS * widest + cache


def _checkpoint_lines(record: dict[str, Any]) -> Iterator[str]:
    quantization = record["quantization"]
    yield f"folder        {record['folder']}"
    for key, value in record["source"].items():
        if value:
            yield f"{key:13} {value}"
    yield f"dtype         {record['dtype']}, embeddings {'tied' if record['tied_embeddings'] else 'not tied'}"
    if quantization:
        yield "quantization  " + ", ".join(f"{k} {v}" for k, v in quantization.items() if not isinstance(v, dict))
    yield f"made for      {record['image_size']} px, {record['max_length']} positions"
    yield ""
    yield f"{'part':16}{'parameters':>14}{'size':>10}{'bits/weight':>13}"
    for name, part in record["parts"].items():
        size = readable_bytes(part["size_bytes"])
        yield f"{name:16}{part['parameters']:>14,}{size:>10}{part['bits_per_weight']:>13.2f}"
    yield ""
    yield f"{'resolution':16}{'visual tokens':>14}{'memory':>10}"
    for side, needs in record["resolutions"].items():
        yield f"{side:>4} px{needs['visual_tokens']:>23}{readable_bytes(needs['memory_bytes']):>10}"
