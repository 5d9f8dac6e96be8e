"""Checkpoints for the converter's tests: the golden ones, changed copies of them, and headers without weights."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.projections import part_paths

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
APPLE = GOLDEN / "apple"
MANIFESTS = TESTS / "manifests"

Tensors = dict[str, npt.NDArray[Any]]

SOURCES = {
    "apple-train": GOLDEN / "apple" / "train",
    "apple": GOLDEN / "apple" / "reparam",
    "apple-untied": GOLDEN / "apple_untied" / "train",
    "apple-hot": GOLDEN / "apple_hot" / "train",
    "transformers-train": GOLDEN / "transformers_train" / "model",
    "transformers": GOLDEN / "transformers_reparam" / "model",
    "mlx-vlm": GOLDEN / "mlx_vlm" / "fp32",
    "mlx-vlm-q8": GOLDEN / "mlx_vlm" / "q8",
    "mlx-vlm-q4": GOLDEN / "mlx_vlm" / "q4",
}
"""A golden checkpoint of every layout."""


def tensors(folder: Path) -> Tensors:
    """Every tensor of a folder with one safetensors file, the projections of a converted one by upstream's names."""
    values = dict(load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    if "fastvlm_format" not in config:
        return values
    sizes = ModelConfig.from_dict(config).text_config.part_rows
    for name in list(values):
        path, _, leaf = name.rpartition(".")
        rows = sizes.get(path.rpartition(".")[2])
        if rows is not None:
            parts = np.split(values.pop(name), np.cumsum(rows)[:-1])
            values |= {f"{part}.{leaf}": value for part, value in zip(part_paths(path), parts, strict=True)}
    return values


def in_first_format(source: Path, target: Path) -> Path:
    """A copy of a converted checkpoint in version 1 of the format: each projection is a tensor of its own."""
    return changed(source, target, edit=lambda _: None, config={"fastvlm_format": 1})


def changed(
    source: Path,
    target: Path,
    *,
    edit: Callable[[Tensors], None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of a checkpoint at `target`, its tensors edited in place and its config.json updated."""
    shutil.copytree(source, target)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    if edit is not None:
        values = tensors(target)
        edit(values)
        values = {name: np.ascontiguousarray(value) for name, value in values.items()}
        save_file(values, target / "model.safetensors")
    if config is not None:
        path = target / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def header_only(manifest: Path, folder: Path) -> Path:
    """A checkpoint with the names, dtypes and shapes of a manifest, and zeros that take no room on disk."""
    described = json.loads(manifest.read_text())["tensors"]
    shutil.copytree(GOLDEN / "apple" / "reparam", folder, ignore=shutil.ignore_patterns("model*"))
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in described.items():
        size = int(np.prod(shape)) * {"BF16": 2, "I64": 8}[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
        if "7b" in manifest.stem:  # the only size whose head is not the embedding
            head = entries["lm_head.weight"]["data_offsets"][0]
            file.seek(8 + len(header) + head)
            file.write(b"\x80\x3f")
    config = json.loads((folder / "config.json").read_text())
    heads = {"0.5b": (14, 2), "1.5b": (12, 2), "7b": (28, 4)}[manifest.stem.rpartition("_")[2]]
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in described if "layers." in name}
    config |= {
        "hidden_size": _find(described, "embed_tokens.weight")[1],
        "vocab_size": _find(described, "embed_tokens.weight")[0],
        "intermediate_size": _find(described, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "mm_vision_tower": "mobileclip_l_1024",
        "tie_word_embeddings": "7b" not in manifest.stem,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _find(described: Mapping[str, Any], ending: str) -> list[int]:
    return next(shape for name, (_, shape) in described.items() if name.endswith(ending))
