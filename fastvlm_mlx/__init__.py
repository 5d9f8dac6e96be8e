"""FastVLM vision-language models on MLX.

The public names below are imported on first use (PEP 562), so that `import fastvlm_mlx` loads neither MLX nor NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_mlx.config import ModelConfig as ModelConfig
    from fastvlm_mlx.engine.logprobs import TokenLogprob as TokenLogprob
    from fastvlm_mlx.engine.options import GenerationConfig as GenerationConfig
    from fastvlm_mlx.engine.prefix_cache import PrefixCache as PrefixCache
    from fastvlm_mlx.errors import CheckpointError as CheckpointError
    from fastvlm_mlx.errors import ConfigError as ConfigError
    from fastvlm_mlx.errors import ConversionError as ConversionError
    from fastvlm_mlx.errors import FastVLMError as FastVLMError
    from fastvlm_mlx.errors import GateError as GateError
    from fastvlm_mlx.errors import ImageError as ImageError
    from fastvlm_mlx.errors import PromptError as PromptError
    from fastvlm_mlx.errors import QueueFullError as QueueFullError
    from fastvlm_mlx.errors import RangeError as RangeError
    from fastvlm_mlx.errors import SchemaError as SchemaError
    from fastvlm_mlx.errors import ServerError as ServerError
    from fastvlm_mlx.generation.choose import choose as choose
    from fastvlm_mlx.generation.engine import Engine as Engine
    from fastvlm_mlx.generation.generate import generate as generate
    from fastvlm_mlx.generation.generate import stream_generate as stream_generate
    from fastvlm_mlx.generation.request import Handle as Handle
    from fastvlm_mlx.generation.request import Request as Request
    from fastvlm_mlx.generation.result import Choice as Choice
    from fastvlm_mlx.generation.result import GenerationResult as GenerationResult
    from fastvlm_mlx.generation.result import Timings as Timings
    from fastvlm_mlx.inputs.processor import FastVLMProcessor as FastVLMProcessor
    from fastvlm_mlx.inputs.prompts import Message as Message
    from fastvlm_mlx.inputs.sources import Allow as Allow
    from fastvlm_mlx.inputs.sources import ImageSource as ImageSource
    from fastvlm_mlx.jobs.evaluate import evaluate as evaluate
    from fastvlm_mlx.jobs.questions import Question as Question
    from fastvlm_mlx.jobs.questions import read_questions as read_questions
    from fastvlm_mlx.jobs.scores import EvaluationReport as EvaluationReport
    from fastvlm_mlx.model.fastvlm import FastVLM as FastVLM
    from fastvlm_mlx.resolve import load as load

__version__ = "0.1.0"

_HOME = {
    "load": "resolve",
    "generate": "generation.generate",
    "stream_generate": "generation.generate",
    "GenerationConfig": "engine.options",
    "GenerationResult": "generation.result",
    "PrefixCache": "engine.prefix_cache",
    "Timings": "generation.result",
    "TokenLogprob": "engine.logprobs",
    "Choice": "generation.result",
    "choose": "generation.choose",
    "Engine": "generation.engine",
    "Handle": "generation.request",
    "Request": "generation.request",
    "QueueFullError": "errors",
    "FastVLM": "model.fastvlm",
    "FastVLMProcessor": "inputs.processor",
    "FastVLMError": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "ConversionError": "errors",
    "ImageError": "errors",
    "PromptError": "errors",
    "GateError": "errors",
    "RangeError": "errors",
    "SchemaError": "errors",
    "ServerError": "errors",
    "Allow": "inputs.sources",
    "ImageSource": "inputs.sources",
    "Message": "inputs.prompts",
    "ModelConfig": "config",
    "EvaluationReport": "jobs.scores",
    "Question": "jobs.questions",
    "evaluate": "jobs.evaluate",
    "read_questions": "jobs.questions",
}

__all__ = [
    "Allow",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "ConversionError",
    "Engine",
    "EvaluationReport",
    "FastVLM",
    "FastVLMError",
    "FastVLMProcessor",
    "GateError",
    "GenerationConfig",
    "GenerationResult",
    "Handle",
    "ImageError",
    "ImageSource",
    "Message",
    "ModelConfig",
    "PrefixCache",
    "PromptError",
    "Question",
    "QueueFullError",
    "RangeError",
    "Request",
    "SchemaError",
    "ServerError",
    "Timings",
    "TokenLogprob",
    "__version__",
    "choose",
    "evaluate",
    "generate",
    "load",
    "read_questions",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
