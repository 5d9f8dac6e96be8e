"""Captions pictures with mlx-vlm's `batch_generate`, in an environment with mlx-vlm and without this project.

    python benchmarks/peer_batch.py '{"model": FOLDER, "images": [FILE, …], "resolution": 256, "max_tokens": 48, …}'

`throughput.py` runs it. The last line on stdout is JSON: seconds for all pictures, and the tokens of each answer.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

warnings.filterwarnings("ignore")

from mlx_vlm import load  # noqa: E402
from mlx_vlm.generate import batch_generate  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402


def main() -> None:
    """Answers the same question about every image, `batch` at a time."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    model, processor = load(request["model"])
    side, batch = request["resolution"], request["batch"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    prompt = apply_chat_template(processor, model.config, request["prompt"], num_images=1)
    prompts = [prompt] * batch

    def answer(images: list[str]) -> Any:
        return batch_generate(
            model, processor, images, prompts=prompts[: len(images)], max_tokens=request["max_tokens"]
        )

    answer(request["images"][:1])
    start = time.perf_counter()
    tokens = 0
    for first in range(0, len(request["images"]), batch):
        response = answer(request["images"][first : first + batch])
        tokens += response.stats.generation_tokens
    seconds = time.perf_counter() - start
    versions = {name: version(name) for name in ("mlx-vlm", "mlx")}
    print(json.dumps({"seconds": seconds, "tokens": tokens, "versions": versions}))


main()
