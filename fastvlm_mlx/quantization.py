"""Which layers of a model are quantized, and how; read from and written to `config.json` as mlx-lm does."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastvlm_mlx.backend import nn
from fastvlm_mlx.errors import ConfigError


def quantize_layers(model: nn.Module, quantization: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Replaces the layers of `model` that a checkpoint stores quantized by quantized ones, in place.

    Args:
        model: Any module tree with linears and embeddings.
        quantization: `group_size`, `bits` and `mode` for every layer, and per module path another such mapping.
        stored: The names of the checkpoint's tensors; a layer is quantized if its `scales` are among them.

    Raises:
        ConfigError: If what is stored names a layer that cannot be quantized, or the settings are impossible.
    """
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}
    paths = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    modules = dict(model.named_modules())
    if unknown := sorted(path for path in paths if not hasattr(modules.get(path), "to_quantized")):
        raise ConfigError(f"{unknown[0]} is stored quantized, but the model has no such linear or embedding")

    def settings(path: str, _: nn.Module) -> bool | dict[str, Any]:
        override = quantization.get(path)
        if path not in paths:
            return False
        return {**default, **override} if isinstance(override, Mapping) else default

    try:
        nn.quantize(model, mode=default.get("mode", "affine"), class_predicate=settings)
    except (ValueError, TypeError) as err:
        raise ConfigError(f"quantization {dict(default)} is not possible: {err}") from err
