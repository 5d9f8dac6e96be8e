"""`fastvlm info`: shows this machine, or what a checkpoint holds and needs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.options import MODEL_HELP, Revision, complete_model, refuse
from fastvlm_mlx.cli.terminal import ByteProgress, note, show, show_json
from fastvlm_mlx.formatting import readable_bytes

RESOLUTIONS = (256, 512, 768, 1024, 1536)
"""What the table of a checkpoint has rows for, in pixels per side."""


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show this machine, or a checkpoint.

    Without MODEL: device, memory, BLAS and the converted models in the cache. With MODEL: its source and its parts,
    and for each resolution the visual tokens and an estimate of the memory that a question takes here.
    """
    if model is None:
        refuse(["--revision"] if revision else [], "without MODEL")
    record = _machine() if model is None else _checkpoint(model, revision)
    if as_json:
        show_json(record)
    else:
        show("\n".join(_machine_lines(record) if model is None else _checkpoint_lines(record)))


def _machine() -> dict[str, Any]:
    from fastvlm_mlx import __version__
    from fastvlm_mlx.backend import blas
    from fastvlm_mlx.checkpoint.describe import folder_bytes
    from fastvlm_mlx.checkpoint.folder import is_converted
    from fastvlm_mlx.machine import cache_folder, describe

    cache = cache_folder()
    return {
        "fastvlm_mlx": __version__,
        **asdict(describe()),
        "blas": asdict(blas()),
        "cache": str(cache),
        "cached": {folder.name: folder_bytes(folder) for folder in sorted(cache.glob("*")) if is_converted(folder)},
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
    yield f"cache        {record['cache']}" + ("" if record["cached"] else " (empty)")
    for name, size in record["cached"].items():
        yield f"             {name}, {readable_bytes(size)}"


def _checkpoint(name: str, revision: str | None) -> dict[str, Any]:
    from fastvlm_mlx.checkpoint.describe import parts, question_memory
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
        "parts": {
            name: {**asdict(part), "bits_per_weight": part.bits_per_weight}
            for name, part in parts(config, weights).items()
        },
        "resolutions": {
            side: {"visual_tokens": (side // patch_size) ** 2, "memory_bytes": question_memory(config, weights, side)}
            for side in RESOLUTIONS
        },
    }


def _checkpoint_lines(record: dict[str, Any]) -> Iterator[str]:
    quantization = record["quantization"]
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
    yield f"{'resolution':16}{'visual tokens':>14}{'memory':>10}"
    for side, needs in record["resolutions"].items():
        yield f"{side:>4} px{needs['visual_tokens']:>23}{readable_bytes(needs['memory_bytes']):>10}"


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
