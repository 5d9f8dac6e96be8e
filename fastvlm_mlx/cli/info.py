"""`fastvlm info`: shows this machine, or what a checkpoint holds and needs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, Revision, complete_model, refuse
from fastvlm_mlx.cli.terminal import show, show_json
from fastvlm_mlx.formatting import readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.checkpoint.describe import Stored
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.convert.plan import Plan

RESOLUTIONS = (256, 512, 768, 1024, 1536)
"""What the table of a checkpoint has rows for beside the model's own resolution, in pixels per side."""


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show this machine, or a checkpoint.

    Without MODEL: device, memory, BLAS and the cache, of which `fastvlm cache` shows more. With MODEL: its source and
    its parts, and for each resolution the visual tokens and an estimate of the memory that a question takes here.
    Nothing is downloaded or converted: of a model on the Hub only headers are read.
    """
    if model is None:
        refuse({"--revision": revision}, "without MODEL")
    record = _machine() if model is None else _checkpoint(model, revision)
    if as_json:
        show_json(record)
    else:
        show("\n".join(_machine_lines(record) if model is None else _checkpoint_lines(record)))


def _machine() -> dict[str, Any]:
    from fastvlm_mlx import __version__
    from fastvlm_mlx.backend import blas
    from fastvlm_mlx.cache import items
    from fastvlm_mlx.machine import cache_folder, describe

    found = items()
    return {
        "fastvlm_mlx": __version__,
        **asdict(describe()),
        "blas": asdict(blas()),
        "cache": str(cache_folder()),
        "cached": {item.name: item.size_bytes for item in found if item.kind == "model"},
        "answers_bytes": sum(item.size_bytes for item in found if item.kind == "answers"),
    }


def _machine_lines(record: dict[str, Any]) -> Iterator[str]:
    blas = record["blas"]
    yield f"fastvlm-mlx  {record['fastvlm_mlx']}, mlx {record['mlx']}, Python {record['python']}"
    yield f"device       {record['device']}: {record['chip']}, {record['cores']} cores"
    yield f"memory       {readable_bytes(record['memory'])}"
    yield f"system       {record['system']}"
    yield f"BLAS         {blas['name']}" + (f", {blas['threads']} threads" if blas["threads"] else "")
    if blas["hint"]:
        yield f"             faster: {blas['hint']}"
    yield f"cache        {record['cache']}" + ("" if record["cached"] or record["answers_bytes"] else " (empty)")
    for name, size in record["cached"].items():
        yield f"             {name}, {readable_bytes(size)}"
    if record["answers_bytes"]:
        yield f"             answers of fastvlm eval, {readable_bytes(record['answers_bytes'])}"


def from_headers(name: str, revision: str | None) -> "tuple[ModelConfig, Mapping[str, Stored], Path | Plan]":
    """The config and the tensors of a checkpoint without its weights; its folder, or the plan of its conversion."""
    from fastvlm_mlx.checkpoint.describe import tensors
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.convert import plan
    from fastvlm_mlx.resolve import find

    folder = find(name, revision=revision)
    if folder is not None:
        return ModelConfig.from_path(folder), tensors(folder), folder
    planned: Plan = plan(name, revision=revision)
    stored = {path: tensor for shard in planned.shards for path, tensor in shard.tensors.items()}
    return planned.config, stored, planned


def _checkpoint(name: str, revision: str | None) -> dict[str, Any]:
    from fastvlm_mlx.checkpoint.describe import parts, question_memory

    config, weights, found = from_headers(name, revision)
    own, patch_size = config.vision_config.image_size, config.vision_config.patch_size
    memory = {side: question_memory(config, weights, side) for side in dict.fromkeys((own, *RESOLUTIONS))}
    return {
        "folder": str(found) if isinstance(found, Path) else None,
        "unconverted": None
        if isinstance(found, Path)
        else {"layout": found.layout, "source_bytes": found.source_bytes, "bytes": found.output_bytes},
        "source": config.source,
        "dtype": config.dtype,
        "quantization": config.quantization.to_dict() if config.quantization else None,
        "tied_embeddings": config.text_config.tie_word_embeddings,
        "image_size": own,
        "max_length": config.max_length,
        "parts": {
            name: {**asdict(part), "bits_per_weight": part.bits_per_weight}
            for name, part in parts(config, weights).items()
        },
        "resolutions": {
            side: {
                "visual_tokens": (side // patch_size) ** 2,
                "memory_bytes": needed.kept,
                "generate_memory_bytes": needed.once,
            }
            for side, needed in memory.items()
        },
    }


def _checkpoint_lines(record: dict[str, Any]) -> Iterator[str]:
    quantization = record["quantization"]
    if planned := record["unconverted"]:
        size, result = readable_bytes(planned["source_bytes"]), readable_bytes(planned["bytes"])
        yield f"weights       {size} as published ({planned['layout']}), not converted yet"
        yield f"conversion    {result}; all figures below are for it"
    else:
        yield f"folder        {record['folder']}"
    for key, value in record["source"].items():
        if value:
            yield f"{key:13} {value}"
    yield f"dtype         {record['dtype']}, embeddings {'tied' if record['tied_embeddings'] else 'not tied'}"
    if quantization:
        yield f"quantization  {_quantization_text(quantization)}"
    yield f"made for      {record['image_size']} px, {record['max_length']} positions"
    yield ""
    yield f"{'part':16}{'parameters':>14}{'size':>10}{'bits/weight':>13}"
    for name, part in record["parts"].items():
        size = readable_bytes(part["size_bytes"])
        yield f"{name:16}{part['parameters']:>14,}{size:>10}{part['bits_per_weight']:>13.2f}"
    yield ""
    yield f"{'resolution':18}{'visual tokens':>14}{'generate':>10}{'loaded':>10}"
    for side, needs in record["resolutions"].items():
        own = " (its own)" if side == record["image_size"] else ""
        once, kept = readable_bytes(needs["generate_memory_bytes"]), readable_bytes(needs["memory_bytes"])
        yield f"{f'{side:>4} px{own}':18}{needs['visual_tokens']:>14}{once:>10}{kept:>10}"
    yield ""
    yield "Estimated peak of memory for a question: generate, by `fastvlm generate`, which frees what is not needed any"
    yield "more; loaded, by a program that keeps the model for other questions, such as one that calls `load`."


def _quantization_text(entry: dict[str, Any]) -> str:
    """The entry of a config.json in words: `3 to 8 bits by layer, groups of 64, affine`."""
    layers = [entry, *(layer for layer in entry.values() if isinstance(layer, dict))]
    bits, groups, modes = (
        sorted({layer[key] for layer in layers if layer.get(key)}) for key in ("bits", "group_size", "mode")
    )
    words = [f"{bits[0]} to {bits[-1]} bits by layer" if len(bits) > 1 else f"{bits[0]} bits"] if bits else []
    if groups:
        words.append(f"groups of {' and '.join(map(str, groups))}")
    return ", ".join([*words, " and ".join(modes)])
