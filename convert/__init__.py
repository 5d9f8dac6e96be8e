"""Converts any published FastVLM checkpoint to this project's folded MLX format, without torch."""

from fastvlm_mlx.convert.conversion import convert_checkpoint, plan
from fastvlm_mlx.convert.plan import Dropped, Plan
from fastvlm_mlx.convert.source.source import open_source

__all__ = ["Dropped", "Plan", "convert_checkpoint", "open_source", "plan"]
