"""Runs fastvlm-mlx in a process of `peers.py`, which defines what it reads and writes."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx import load, stream_generate
from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.engine.prefix_cache import PrefixCache


def answer(
    model: Any, processor: Any, image: str, request: dict[str, Any], prefix_cache: PrefixCache
) -> tuple[float, float, list[int]]:
    """Returns the seconds from the file's bytes to the first token, the tokens per second after it, and token ids."""
    data = Path(image).read_bytes()
    start = time.perf_counter()
    first, pieces = 0.0, []
    for piece in stream_generate(
        model,
        processor,
        image=data,
        prompt=request["prompt"],
        resolution=request["resolution"],
        max_tokens=request["max_tokens"],
        prefix_cache=prefix_cache,
    ):
        if not first:
            first = time.perf_counter() - start
            print("first", flush=True)
        pieces.append(piece)
    return first, pieces[-1].tokens_per_second, [token for piece in pieces for token in piece.token_ids]


def agreement(model: Any, processor: Any, image: str, request: dict[str, Any]) -> dict[str, Any]:
    """Returns greedy tokens and the lead of each over the second choice; saves the first one's log-probabilities."""
    import numpy as np

    inputs = processor(image, request["prompt"], resolution=request["resolution"])
    logits, cache = model.prefill(inputs["input_ids"], inputs["pixel_values"])
    tokens, margins = [], []
    for step in range(request["max_tokens"]):
        log_probabilities = np.array(nn.log_softmax(logits[0].astype(mx.float32)))
        if step == 0:
            np.save(request["logits"], log_probabilities)
        second, best = np.argsort(log_probabilities)[-2:]
        tokens.append(int(best))
        margins.append(float(log_probabilities[best] - log_probabilities[second]))
        logits = model.language_model(mx.array([[int(best)]]), cache)[:, -1]
    return {"tokens": tokens, "margins": margins}


def main() -> None:
    """Answers about each image of the request and writes the measurements as JSON."""
    request = json.loads(sys.argv[1])
    model, processor = load(request["model"], dtype=request["dtype"])
    result: dict[str, Any]
    if request.get("logits"):
        result = agreement(model, processor, request["images"][0], request)
    else:
        result = {}
        prefix_cache = PrefixCache()  # as in a program that stays alive
        for image in request["images"]:
            result["warm_ttft"], result["decode_rate"], result["tokens"] = answer(
                model, processor, image, request, prefix_cache
            )
            result.setdefault("peak_bytes", mx.get_peak_memory())
    result["versions"] = {name: version(name) for name in ("fastvlm-mlx", "mlx", "numpy", "pillow")}
    print(json.dumps(result))


main()
