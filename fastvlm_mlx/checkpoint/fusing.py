"""Tensors of the decoder's projections, fused or in parts: which are stored, and how one becomes the other."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import ModelConfig, QuantizationConfig, TextConfig
from fastvlm_mlx.projections import LEAVES, PARTS, fused_path, part_paths


def fused(weights: Mapping[str, mx.array], config: ModelConfig, streams: Sequence[mx.Stream]) -> dict[str, mx.array]:
    """The tensors of a checkpoint, with the parts of each projection joined that are stored alike.

    Of a checkpoint in the first version of the format these are all projections, or all whose parts are quantized
    alike. Nothing is read here.
    """
    result = dict(weights)
    for number, path in enumerate(stored_in_parts(weights)):
        parts = [_leaves(weights, part) for part in part_paths(path)]
        forms = [{leaf: (value.dtype, value.shape[1:]) for leaf, value in part.items()} for part in parts]
        if forms.count(forms[0]) < len(forms) or not _have_equal_settings(path, config.quantization):
            continue
        for leaf in parts[0]:
            joined = mx.concatenate([part[leaf] for part in parts], stream=streams[number % len(streams)])
            result[f"{path}.{leaf}"] = joined
            for part in part_paths(path):
                del result[f"{part}.{leaf}"]
    return result


def fused_names(names: Collection[str], quantization: QuantizationConfig) -> list[str]:
    """The names that the tensors of a quantized checkpoint have after `fused`; they may be fused already."""
    result = dict.fromkeys(names)
    for path in stored_in_parts(names):
        parts = [[leaf for leaf in LEAVES if f"{part}.{leaf}" in result] for part in part_paths(path)]
        if parts.count(parts[0]) == len(parts) and _have_equal_settings(path, quantization):
            result |= dict.fromkeys(f"{path}.{leaf}" for leaf in parts[0])
            for part in part_paths(path):
                for leaf in parts[0]:
                    del result[f"{part}.{leaf}"]
    return list(result)


def in_parts(weights: Mapping[str, mx.array], text: TextConfig) -> dict[str, mx.array]:
    """The tensors of a checkpoint by upstream's names: the rows of each part of a fused projection. Nothing is read."""
    result: dict[str, mx.array] = {}
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        projection = path.rpartition(".")[2]
        if projection not in PARTS:
            result[name] = value
            continue
        ends = accumulate(text.part_rows[projection], initial=0)
        for part, (start, end) in zip(part_paths(path), pairwise(ends), strict=True):
            result[f"{part}.{leaf}"] = value[start:end]
    return result


def stored_in_parts(names: Collection[str]) -> list[str]:
    """The paths of the fused projections of which `names` has all parts."""
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    paths = dict.fromkeys(fused_path(layer) for layer in layers)
    return [path for path in paths if path is not None and layers.issuperset(part_paths(path))]


def _leaves(weights: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    return {leaf: weights[f"{path}.{leaf}"] for leaf in LEAVES if f"{path}.{leaf}" in weights}


def _have_equal_settings(path: str, quantization: QuantizationConfig | None) -> bool:
    return quantization is None or len({quantization.for_layer(part) for part in part_paths(path)}) == 1
