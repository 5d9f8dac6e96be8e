"""Converts any published FastVLM checkpoint to this project's folded MLX format, without torch."""

from typing import TYPE_CHECKING, Any

from fastvlm_mlx.convert.conversion import convert_checkpoint, plan

if TYPE_CHECKING:
    from fastvlm_mlx.convert.compare.verify import verify
    from fastvlm_mlx.convert.quantize.checkpoint import quantize_checkpoint

__all__ = ["convert_checkpoint", "plan", "quantize_checkpoint", "verify"]


def __getattr__(name: str) -> Any:
    """Imports the functions that run models on first use: a dry run needs no MLX."""
    if name == "quantize_checkpoint":
        from fastvlm_mlx.convert.quantize.checkpoint import quantize_checkpoint

        return quantize_checkpoint
    if name == "verify":
        from fastvlm_mlx.convert.compare.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
