"""A model to measure, from disk or with random weights."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.bench.random_model import random_model
from fastvlm_mlx.checkpoint.describe import PARTS
from fastvlm_mlx.checkpoint.folder import weight_files
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.released import full_size, parse_name
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.resolve import Progress, resolve


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: Its name in tables.
        model: The loaded model, all weights in memory.
        processor: The model's processor.
        folder: The folder of its files; None for random weights.
        dtype: The type that loading it was told to use; None for the default.
        load_seconds: Seconds that loading took, without converting; None for random weights.
        sha256: Digest of the weight files in their order; None for random weights.
        prefix_cache: Shared by all its answers, as in a program that stays alive.
    """

    name: str
    model: FastVLM
    processor: FastVLMProcessor
    folder: Path | None = None
    dtype: str | None = None
    load_seconds: float | None = None
    sha256: str | None = None
    prefix_cache: PrefixCache = field(default_factory=PrefixCache, repr=False)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        notify: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> "Candidate":
        """Loads the model that `fastvlm_mlx.load` knows by `name`; raises what that raises."""
        location = parse_name(name)
        folder = resolve(name, revision=revision, notify=notify, progress=progress)
        start = time.perf_counter()
        model = load_model(folder, dtype=dtype)
        mx.eval(model.parameters())
        load_seconds = time.perf_counter() - start
        digest = hashlib.sha256()
        for file in weight_files(folder):
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return cls(
            name=name if location.path is None or location.bundled else location.path.resolve().name,
            model=model,
            processor=FastVLMProcessor.from_folder(folder),
            folder=folder,
            dtype=dtype,
            load_seconds=load_seconds,
            sha256=digest.hexdigest(),
        )

    @classmethod
    def random(cls, size: str, *, dtype: str | None = None) -> "Candidate":
        """Makes a model of the architecture of released size `size`, with random weights."""
        model, processor = random_model(full_size(size, dtype or "float16"))
        mx.eval(model.parameters())
        return cls(name=f"{size}, random", model=model, processor=processor)


def precision(model: FastVLM) -> dict[str, str]:
    """Returns what each part computes in: a dtype, or the bits of its quantized layers."""
    precisions = {}
    for part in PARTS:
        layers = [module for path, module in model.named_modules() if path.startswith(part)]
        quantized = {
            f"{layer.bits}-bit {layer.mode}, groups of {layer.group_size}"
            for layer in layers
            if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
        }
        dtype = str(model.dtype).removeprefix("mlx.core.")
        precisions[part] = " and ".join(sorted(quantized)) + f" ({dtype})" if quantized else dtype
    return precisions
