"""What every function that asks a model checks first."""

from fastvlm_mlx.arguments import check_kind
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import check_process


def check_loaded(model: object, processor: object, prefix_cache: object = None) -> None:
    """Checks that a model and its processor, and a prefix cache or None, are what they should be, and can be used.

    Raises:
        ConfigError: If one of them is something else.
        FastVLMError: If this process was forked from one that has used MLX.
    """
    check_process()
    check_kind(model, "model", FastVLM, "a FastVLM, the first of the two that load returns")
    check_kind(processor, "processor", FastVLMProcessor, "a FastVLMProcessor, the second of the two that load returns")
    if prefix_cache is not None:
        check_kind(prefix_cache, "prefix_cache", PrefixCache, "a PrefixCache or None")
