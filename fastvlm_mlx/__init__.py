"""FastVLM vision-language models on MLX.

The public names below are imported on first use (PEP 562), so that `import fastvlm_mlx` loads neither MLX nor NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_mlx.checkpoint import load as load
    from fastvlm_mlx.errors import FastVLMError as FastVLMError
    from fastvlm_mlx.generation import GenerationResult as GenerationResult
    from fastvlm_mlx.generation import generate as generate
    from fastvlm_mlx.generation import stream_generate as stream_generate
    from fastvlm_mlx.model import FastVLM as FastVLM
    from fastvlm_mlx.processing import FastVLMProcessor as FastVLMProcessor

__version__ = "0.1.0"

_HOME = {
    "load": "checkpoint",
    "generate": "generation",
    "stream_generate": "generation",
    "GenerationResult": "generation",
    "FastVLM": "model",
    "FastVLMProcessor": "processing",
    "FastVLMError": "errors",
}

__all__ = [
    "FastVLM",
    "FastVLMError",
    "FastVLMProcessor",
    "GenerationResult",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
