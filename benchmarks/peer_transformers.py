"""A process of `peers.py` that runs transformers' FastVlm in PyTorch; see there for what it reads and writes."""

import json
import os
import resource
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # torchvision from PyPI is built for CUDA: beside the CPU build of torch its operators are missing, and it will not
    # load unless somebody has at least declared them.
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image  # noqa: E402
from transformers import AutoTokenizer, FastVlmForConditionalGeneration  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.models.clip import CLIPImageProcessor  # noqa: E402

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{images}\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


class Clock(BaseStreamer):  # type: ignore[misc]
    """The time of every token; what is put first is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """A token has been chosen."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            print("first", flush=True)

    def end(self) -> None:
        """Nothing is left to do."""


def answer(model: Any, processors: Any, picture: str, request: dict[str, Any]) -> tuple[float, float, Any]:
    """Seconds from the file to the first token, tokens per second after it, and what `generate` returns."""
    tokenizer, image_processor = processors
    start = time.perf_counter()
    with Image.open(picture) as image:
        pixel_values = image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    images = "<image>" * (request["resolution"] // 64) ** 2
    inputs = tokenizer(TEMPLATE.format(images=images, prompt=request["prompt"]), return_tensors="pt")
    clock = Clock()
    with torch.inference_mode():
        result = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            pixel_values=pixel_values.to(model.device, model.dtype),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            streamer=clock,
            output_logits=True,
            return_dict_in_generate=True,
        )
    times = clock.times[1:]
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0]), result


def agreement(model: Any, processors: Any, picture: str, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens with the log-probabilities of the first and each one's lead over the second choice."""
    import numpy as np

    _, _, result = answer(model, processors, picture, request)
    rows = [torch.log_softmax(row[0].float(), dim=-1).cpu().numpy() for row in result.logits]
    np.save(request["logits"], rows[0])
    return {
        "tokens": [int(row.argmax()) for row in rows],
        "margins": [float(np.diff(np.sort(row)[-2:])[0]) for row in rows],
    }


def peak_bytes() -> int:
    """The most memory that was allocated on the device so far; on MPS what its allocator has kept."""
    if DEVICE == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if DEVICE == "mps":
        return int(torch.mps.driver_allocated_memory())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers about each picture of the request and writes what it took as JSON."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dtype = getattr(torch, request["dtype"])
    model = FastVlmForConditionalGeneration.from_pretrained(request["model"], dtype=dtype).eval()
    model = model.to(DEVICE)
    side = request["resolution"]
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    processors = AutoTokenizer.from_pretrained(request["model"]), image_processor
    result: dict[str, Any] = {}
    if request.get("logits"):
        result = agreement(model, processors, request["pictures"][0], request)
    else:
        for number, picture in enumerate(request["pictures"]):
            result["warm_ttft"], result["decode_rate"], generated = answer(model, processors, picture, request)
            result["tokens"] = [int(row[0].argmax()) for row in generated.logits]
            if number == 0:
                result["peak_bytes"] = peak_bytes()
    names = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow")
    result["versions"] = {name: version(name) for name in names}
    print(json.dumps(result))


main()
