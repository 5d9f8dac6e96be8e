"""Loads the model that a server answers with, and tells the server what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from fastvlm_mlx import __version__
from fastvlm_mlx.arguments import StrPath
from fastvlm_mlx.backend import compute_dtype
from fastvlm_mlx.checkpoint.describe import parts, tensors
from fastvlm_mlx.checkpoint.released import ALIASES, DEMO
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
from fastvlm_mlx.machine import cache_folder
from fastvlm_mlx.resolve import load, resolve
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import LOW_RESOLUTION, Settings

APPLE_LICENSE = "apple-amlr"
"""What Apple's research licence is called on the Hub."""
WARMUP_TOKENS = 2


def load_engine(
    service: Service,
    settings: Settings,
    model: StrPath,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_batch: int | Literal["auto"] = "auto",
    warmup: bool = True,
    notify: Callable[[str], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Engine:
    """The engine of a server.

    Args:
        service: Learns what the model is.
        settings: What is allowed.
        model: See `load`.
        revision: See `load`.
        dtype: See `load`.
        max_batch: See `Engine`.
        warmup: Whether to answer a question at every common resolution, so that a first request is as fast as others.
        notify: See `load`.
        progress: See `load`.

    Raises:
        FastVLMError: If the model cannot be loaded.
    """

    def show(done: int, total: int, what: str) -> None:
        service.activity = f"{what}: {done / max(total, 1):.0%}"
        if progress is not None:
            progress(done, total, what)

    folder = resolve(model, revision=revision, notify=notify, progress=show)
    network, processor = load(folder, dtype=dtype, notify=notify, progress=show)
    config = ModelConfig.from_path(folder)
    service.weights = checkpoint_fingerprint(folder, cache_folder() / "digests.json", show)
    service.dtype = dtype or str(compute_dtype(config.dtype)).rpartition(".")[2]
    service.fingerprint = f"fp_{service.weights[:12]}_{__version__}"
    service.license = license_of(service.name, config)
    sizes = parts(config, tensors(folder)).values()
    service.parameters = sum(part.parameters for part in sizes)
    service.size_bytes = sum(part.size_bytes for part in sizes)
    service.created = int((folder / "config.json").stat().st_mtime)
    engine = Engine(network, processor, max_batch=max_batch, queue_size=settings.max_queue + settings.max_choices)
    try:
        if warmup:
            service.activity = "warming up"
            warm_up(engine, settings)
    except BaseException:
        engine.close()
        raise
    return engine


def warm_up(engine: Engine, settings: Settings) -> None:
    """Answers a question about a black picture at the server's resolution and at the low one, if that is lower."""
    native = settings.resolution if isinstance(settings.resolution, int) else engine.processor.image_size
    lower = [LOW_RESOLUTION] if native > LOW_RESOLUTION else []
    picture = np.zeros((64, 64, 3), np.uint8)
    for resolution in (native, *lower):
        config = GenerationConfig(max_tokens=WARMUP_TOKENS, ignore_eos=True)
        engine.submit(Request(image=picture, resolution=resolution, config=config)).result()


def names_of(model: str) -> tuple[str, tuple[str, ...]]:
    """What clients call a model: its name, and other names that they may use.

    A model on the Hub is called by its id, a folder by its last part.
    """
    hub_id = ALIASES.get(model, model)
    last = hub_id.rstrip("/").rpartition("/")[2].removesuffix(".zip") or hub_id
    is_id = model in ALIASES or (hub_id.count("/") == 1 and not hub_id.startswith((".", "/", "~")))
    name = hub_id if is_id or model == DEMO else last
    short = [alias for alias, known in ALIASES.items() if known == hub_id]
    return name, tuple(dict.fromkeys(each for each in (last, model, *short) if each != name))


def license_of(name: str, config: ModelConfig) -> str:
    """The licence of the weights as the Hub calls it; empty if it is not known."""
    if any(each.startswith("apple/") for each in (name, config.source.get("name") or "")):
        return APPLE_LICENSE
    return "mit" if name == DEMO else ""
