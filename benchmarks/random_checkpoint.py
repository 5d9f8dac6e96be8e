"""Writes full-size FastVLM checkpoints with random weights, in Apple's released layout or in transformers' layout.

Time and memory do not depend on the values of the weights. So these checkpoints can replace the released ones without
a download in end-to-end runs, measurements of memory and comparisons with peers. Names, shapes and dtypes come from
`tests/manifests`, the vocabulary is Qwen2's. As in the released files, there is no tokenizer.json and no processor
file, and `lm_head.weight` is present although the smaller models tie it to the embedding. Both layouts hold the same
numbers.

    python benchmarks/random_checkpoint.py 0.5b /tmp/fastvlm-0.5b
    python benchmarks/random_checkpoint.py 7b /tmp/fastvlm-7b --sparse     # zeros that take no disk space
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.checkpoint.released import SIZES, full_size

LAYOUTS = ("apple", "transformers")
SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 22
BF16_ONE = b"\x80\x3f"
PIXEL_GAIN = 12
"""Compensates for filters that sum to zero, which see little of smooth pixels."""

GELU_GAIN = 2
"""Compensates for what a GELU takes from a signal that has no residual connection."""

IMAGE_TOKEN = 151646

_TESTS = Path(__file__).resolve().parent.parent / "tests"
_ITEM_BYTES = {"BF16": 2, "I64": 8}

Tensor = tuple[str, tuple[int, ...]]
"""Dtype and shape, as in a manifest."""

# Apple's names for transformers' tensors: timm counts stages, Apple the modules of one `network` list.
_BLOCKS = {"0": 0, "1": 2, "2": 4, "3": 7, "4": 10}
_DOWNSAMPLES = {"1": 1, "2": 3, "3": 5, "4": 8}
_POSITIONS = {"3": 6, "4": 9}
_TOWER = "model.vision_tower.vision_tower.model."


def apple_name(name: str) -> str:
    """Returns the name in Apple's layout of transformers' tensor `name`."""
    tower = "model.vision_tower.timm_model."
    if not name.startswith(tower):
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        return name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
    name = name.removeprefix(tower)
    name = name.replace("stem.", "patch_embed.")
    name = re.sub(r"stages\.(\d)\.blocks\.", lambda m: f"network.{_BLOCKS[m[1]]}.", name)
    name = re.sub(r"stages\.(\d)\.downsample\.", lambda m: f"network.{_DOWNSAMPLES[m[1]]}.", name)
    name = re.sub(r"stages\.(\d)\.pos_emb\.", lambda m: f"network.{_POSITIONS[m[1]]}.", name)
    name = name.replace("proj.0.reparam_conv", "proj.0.lkb_reparam").replace(".mlp.", ".convffn.").replace(".gamma", "")
    name = name.replace("final_conv.", "conv_exp.").replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand")
    return _TOWER + name


def read_manifest(size: str, layout: str) -> dict[str, Tensor]:
    """Returns every tensor of a released checkpoint, 8-byte dtypes first: torch cannot map them at an odd offset."""
    tensors = json.loads((_TESTS / "manifests" / f"{layout}_{size}.json").read_text())["tensors"]
    ordered = sorted(tensors.items(), key=lambda item: -_ITEM_BYTES[item[1][0]])
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in ordered}


def values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[np.float32]]:
    """Yields the values of a tensor of Apple's layout in chunks of whole rows; they keep activations near 1.

    Filters are scaled by their fan-in and sum to zero. Otherwise the positive mean that every GELU adds would hide the
    differences between two images. RepMixer and RepCPE kernels, which carry the residual stream, are near the identity.
    """
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    leaf = name.rpartition(".")[2]
    row_size = math.prod(shape[1:])
    mean: NDArray[Any] = np.zeros(row_size, np.float32)
    std = 0.002
    zero_sum = False
    if re.search(r"(norm|bn)\.weight$|running_var$", name):
        mean, std = mean + 1, 0.05
    elif leaf.startswith("layer_scale"):
        mean, std = mean + 0.2, 0.02
    elif re.search(r"token_mixer\.reparam_conv\.weight$|network\.\d+\.reparam_conv\.weight$", name):
        mean[row_size // 2] = 1
        std = 0.1 / math.sqrt(row_size)
    elif leaf in ("weight", "proj"):
        std = 1 / math.sqrt(row_size)
        zero_sum = True
        if name.endswith("patch_embed.0.reparam_conv.weight"):
            std *= PIXEL_GAIN
        elif re.search(r"patch_embed|\.proj\.\d|conv_exp\.reparam_conv", name):
            std *= GELU_GAIN
    rows_at_once = max(1, CHUNK // row_size)
    for start in range(0, shape[0], rows_at_once):
        rows = random.standard_normal((min(rows_at_once, shape[0] - start), row_size), dtype=np.float32)
        rows *= std
        if zero_sum:
            rows -= rows.mean(axis=1, keepdims=True)
        rows += mean
        yield rows


def _write_tensor(file: BinaryIO, name: str, dtype: str, shape: tuple[int, ...], seed: int, tied: bool) -> None:
    """Appends the tensor `name` of Apple's layout, as truncated bfloat16 or as int64 zeros."""
    if dtype == "I64":
        file.write(bytes(8 * math.prod(shape)))
        return
    if name == "lm_head.weight" and tied:
        name = "model.embed_tokens.weight"
    for rows in values(name, shape, seed):
        file.write(rows.view("<u2")[:, 1::2].tobytes())


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, int]:
    """Returns a safetensors header with its length in front, and the number of data bytes that follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divides the tensors, in order, into files of at most `SHARD_BYTES`."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = _ITEM_BYTES[dtype] * math.prod(shape)
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += size
    return shards


def _write_weights(
    folder: Path, tensors: dict[str, Tensor], *, layout: str, tied: bool, seed: int, sparse: bool
) -> None:
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        path = folder / (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        header, size = _header(shard)
        with path.open("wb") as file:
            file.write(header)
            if sparse:
                file.truncate(len(header) + size)
                if not tied and next(reversed(shard)) == "lm_head.weight":
                    file.seek(-len(BF16_ONE), os.SEEK_END)  # all zeros, it would equal the embedding and so be tied
                    file.write(BF16_ONE)
            else:
                for name, (dtype, shape) in shard.items():
                    source = apple_name(name) if layout == "transformers" else name
                    _write_tensor(file, source, dtype, shape, seed, tied)
        weight_map |= dict.fromkeys(shard, path.name)
        total += size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_config(folder: Path, size: str, layout: str, tensors: dict[str, Tensor]) -> None:
    """Writes config.json: that of the small golden checkpoint, with this checkpoint's dimensions."""
    text = full_size(size).text_config
    shapes = {apple_name(name) if layout == "transformers" else name: shape for name, (_, shape) in tensors.items()}
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    heads = text.num_attention_heads
    decoder = {
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // (hidden // heads),
        "vocab_size": vocabulary,
        "tie_word_embeddings": text.tie_word_embeddings,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    if layout == "apple":
        config = json.loads((_TESTS / "golden/apple/train/config.json").read_text())
        config |= decoder | {"mm_hidden_size": 3072, "mm_vision_tower": "mobileclip_l_1024", "torch_dtype": "bfloat16"}
    else:
        config = json.loads((_TESTS / "golden/transformers_reparam/model/config.json").read_text())
        layer_types = ["full_attention"] * decoder["num_hidden_layers"]
        config["text_config"] |= decoder | {"layer_types": layer_types}
        config["vision_config"] |= {"hidden_size": 3072, "image_size": 1024, "model_args": {"inference_mode": True}}
        config |= {
            "dtype": "bfloat16",
            "image_seq_length": 256,
            "image_token_index": IMAGE_TOKEN,
            "tie_word_embeddings": text.tie_word_embeddings,
        }
    _write_json(folder / "config.json", config)


def _write_tokenizer(folder: Path, layout: str) -> None:
    """Writes the real Qwen2 vocabulary; transformers' layout gives `<image>` an id of its own."""
    for source in (_TESTS / "tokenizer" / "qwen2").iterdir():
        shutil.copyfile(source, folder / source.name)
    if layout == "transformers":
        added = json.loads((folder / "added_tokens.json").read_text())
        _write_json(folder / "added_tokens.json", added | {"<image>": IMAGE_TOKEN})
        config = json.loads((folder / "tokenizer_config.json").read_text())
        end = config["added_tokens_decoder"]["151645"]
        config["added_tokens_decoder"][str(IMAGE_TOKEN)] = end | {"content": "<image>"}
        _write_json(folder / "tokenizer_config.json", config)


def write_checkpoint(
    size: str, destination: Path, *, layout: str = "apple", seed: int = 0, sparse: bool = False
) -> None:
    """Writes a checkpoint folder; the same seed gives both layouts the same numbers.

    Args:
        size: `0.5b` (1.5 GB), `1.5b` (4 GB) or `7b` (16 GB).
        destination: The folder, which must not exist; it is written beside it and renamed when complete.
        layout: `apple` or `transformers`.
        seed: Of the random values.
        sparse: Whether to write zeros that take almost no disk space.

    Raises:
        FileExistsError: If `destination` exists.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} exists already")
    folder = destination.with_name(destination.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = read_manifest(size, layout)
    _write_config(folder, size, layout, tensors)
    _write_tokenizer(folder, layout)
    tied = full_size(size).text_config.tie_word_embeddings
    _write_weights(folder, tensors, layout=layout, tied=tied, seed=seed, sparse=sparse)
    folder.rename(destination)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("destination", type=Path, help="folder to write; must not exist")
    parser.add_argument("--layout", choices=LAYOUTS, default="apple")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="all zeros, in sparse files")
    options = parser.parse_args()
    try:
        write_checkpoint(
            options.size, options.destination, layout=options.layout, seed=options.seed, sparse=options.sparse
        )
    except OSError as error:
        sys.exit(f"error: {error}")
    print(options.destination)


if __name__ == "__main__":
    main()
