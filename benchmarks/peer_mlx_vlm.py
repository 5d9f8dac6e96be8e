"""Runs mlx-vlm in a process of `peers.py`, which defines what it reads and writes."""

import json
import resource
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

warnings.filterwarnings("ignore")

import mlx.core as mx  # noqa: E402
from mlx_vlm import load, stream_generate  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402


def answer(
    model: Any, processor: Any, image: str, request: dict[str, Any]
) -> tuple[float, float, list[int], list[Any]]:
    """Returns seconds from the file to the first token, tokens per second after it, token ids and log-probabilities."""
    prompt = apply_chat_template(processor, model.config, request["prompt"], num_images=1)
    start = time.perf_counter()
    times: list[float] = []
    tokens: list[int] = []
    log_probabilities: list[Any] = []
    for piece in stream_generate(
        model, processor, prompt, image=[image], max_tokens=request["max_tokens"], temperature=0.0
    ):
        if not times:
            print("first", flush=True)
        if len(tokens) < request["max_tokens"] and piece.token is not None and piece.finish_reason is None:
            times.append(time.perf_counter() - start)
            tokens.append(int(piece.token))
            log_probabilities.append(piece.logprobs)
    return times[0], (len(times) - 1) / (times[-1] - times[0]), tokens, log_probabilities


def agreement(model: Any, processor: Any, image: str, request: dict[str, Any]) -> dict[str, Any]:
    """Returns greedy tokens and the lead of each over the second choice; saves the first one's log-probabilities."""
    import numpy as np

    _, _, tokens, log_probabilities = answer(model, processor, image, request)
    rows = [np.array(row, dtype=np.float32).reshape(-1) for row in log_probabilities]
    np.save(request["logits"], rows[0])
    return {"tokens": tokens, "margins": [float(np.diff(np.sort(row)[-2:])[0]) for row in rows]}


def main() -> None:
    """Answers about each image of the request and writes the measurements as JSON."""
    request = json.loads(sys.argv[1])
    model, processor = load(request["model"])
    side = request["resolution"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    result: dict[str, Any] = {}
    if request.get("logits"):
        result = agreement(model, processor, request["images"][0], request)
    else:
        for number, image in enumerate(request["images"]):
            result["warm_ttft"], result["decode_rate"], result["tokens"], _ = answer(model, processor, image, request)
            if number == 0:
                result["peak_bytes"] = (
                    mx.get_peak_memory()
                    if mx.default_device() == mx.gpu
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                )
    result["versions"] = {name: version(name) for name in ("mlx-vlm", "mlx", "transformers", "numpy", "pillow")}
    print(json.dumps(result))


main()
