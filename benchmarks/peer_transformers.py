"""Runs transformers' FastVlm in PyTorch in a process of `peers.py`, which defines what it reads and writes."""

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
    # torchvision from PyPI is built for CUDA. Beside the CPU build of torch its operators are missing, and it does not
    # load unless they are declared.
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
    """Records the time of every token; the first call is about the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Records the time of a token."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            print("first", flush=True)

    def end(self) -> None:
        """Does nothing."""


def answer(model: Any, processors: Any, image: str, request: dict[str, Any]) -> tuple[float, float, Any]:
    """Returns the seconds from the file to the first token, the tokens per second after it, and `generate`'s result."""
    tokenizer, image_processor = processors
    start = time.perf_counter()
    with Image.open(image) as opened:
        pixel_values = image_processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
    visual_tokens = "<image>" * (request["resolution"] // 64) ** 2
    inputs = tokenizer(TEMPLATE.format(images=visual_tokens, prompt=request["prompt"]), return_tensors="pt")
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


def agreement(model: Any, processors: Any, image: str, request: dict[str, Any]) -> dict[str, Any]:
    """Returns greedy tokens and the lead of each over the second choice; saves the first one's log-probabilities."""
    import numpy as np

    _, _, result = answer(model, processors, image, request)
    rows = [torch.log_softmax(row[0].float(), dim=-1).cpu().numpy() for row in result.logits]
    np.save(request["logits"], rows[0])
    return {
        "tokens": [int(row.argmax()) for row in rows],
        "margins": [float(np.diff(np.sort(row)[-2:])[0]) for row in rows],
    }


def peak_bytes() -> int:
    """Returns the most memory that was allocated on the device so far; on MPS, the memory that its allocator holds."""
    if DEVICE == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if DEVICE == "mps":
        return int(torch.mps.driver_allocated_memory())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers about each image of the request and writes the measurements as JSON."""
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
        result = agreement(model, processors, request["images"][0], request)
    else:
        for number, image in enumerate(request["images"]):
            result["warm_ttft"], result["decode_rate"], generated = answer(model, processors, image, request)
            result["tokens"] = [int(row[0].argmax()) for row in generated.logits]
            if number == 0:
                result["peak_bytes"] = peak_bytes()
    names = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow")
    result["versions"] = {name: version(name) for name in names}
    print(json.dumps(result))


main()
