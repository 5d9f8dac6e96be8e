"""Converts any published FastVLM checkpoint to this project's folded MLX format, and quantizes and compares it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.convert.conversion import convert_checkpoint, plan

if TYPE_CHECKING:
    from fastvlm_mlx.convert.compare.verify import Verification as Verification
    from fastvlm_mlx.convert.compare.verify import verify as verify
    from fastvlm_mlx.convert.pipeline import convert_and_quantize as convert_and_quantize
    from fastvlm_mlx.convert.quantize.checkpoint import quantize_checkpoint as quantize_checkpoint
    from fastvlm_mlx.convert.quantize.report import QuantizationReport as QuantizationReport
    from fastvlm_mlx.convert.quantize.scheme import Quantization as Quantization

_HOME = {
    "Quantization": "quantize.scheme",
    "QuantizationReport": "quantize.report",
    "Verification": "compare.verify",
    "convert_and_quantize": "pipeline",
    "quantize_checkpoint": "quantize.checkpoint",
    "verify": "compare.verify",
}

__all__ = [
    "Quantization",
    "QuantizationReport",
    "Verification",
    "convert_and_quantize",
    "convert_checkpoint",
    "plan",
    "quantize_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports what runs models on first use: a dry run needs no MLX."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
