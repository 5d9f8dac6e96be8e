"""Arguments of the Python API."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fastvlm_mlx import (
    Engine,
    FastVLMProcessor,
    GenerationConfig,
    PrefixCache,
    Request,
    generate,
    stream_generate,
)
from fastvlm_mlx.backend import mx
from fastvlm_mlx.convert import convert_checkpoint, plan, quantize_checkpoint
from fastvlm_mlx.convert.pipeline import convert_and_quantize
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.questions import BadRow, read_questions
from tests.fuzz.damage import VALUES
from tests.fuzz.room import Room
from tests.fuzz.subject import PICTURE, load

_PYTHON: tuple[Any, ...] = (
    *(value for value in VALUES if not (isinstance(value, str) and value.startswith("\0"))),
    *(b"", b"x", (), set(), object(), len, Path("x"), Path(), 1j, range(3), Ellipsis, NotImplemented),
    *(np.int64(3), np.int8(-1), np.float32("nan"), np.float64(0.5), np.bool_(True), np.str_("x"), np.array(2)),
    *(np.zeros((2, 2)), np.array([], dtype=object), np.arange(9).reshape(1, 9), np.zeros((1, 64, 64, 3), np.float32)),
    *(mx.array(1), mx.array([1.5]), mx.zeros((1, 64, 64, 3)), mx.array([[1, 2]])),
    *("auto", "float16", "float8", "demo", 128, 4160, 10**5, -64, 65, 2**24, 1e-39, 0.1),
)
"""What a program may hand over by mistake."""

Call = tuple[Callable[..., Any], dict[str, Any]]
"""A function and right arguments for it."""


def _asking(room: Room) -> dict[str, Call]:
    """Everything that takes a picture, a prompt, token ids or settings."""
    model, processor = room.model()
    sampled = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "seed": 1}
    settings = {**sampled, "max_tokens": 2, "ignore_eos": False}
    asked = {"image": PICTURE, "prompt": "What?", "resolution": 64, "system": "Be brief.", "allow": None}
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    rows = {"input_ids": [[1, -200, 3]], "pixel_values": pixels, "attention_mask": [[True, True, True]]}

    def all_pieces(**arguments: Any) -> Any:
        return list(stream_generate(model, processor, **arguments))

    def with_prefix_cache(max_bytes: Any) -> Any:
        return generate(
            model, processor, image=PICTURE, resolution=64, max_tokens=2, prefix_cache=PrefixCache(max_bytes)
        )

    def prepared(images: Any, prompt: Any, resolution: Any, system: Any) -> Any:
        return processor.prepare(images, prompt, resolution=resolution, system=system).input_ids

    def with_engine(max_batch: Any, queue_size: Any, **request: Any) -> Any:
        with Engine(model, processor, max_batch=max_batch, queue_size=queue_size) as engine:
            return engine.submit(Request(**request)).result(30)

    whole = {**asked, **settings, "stop": "x", "config": None, "prefix_cache": None}
    return {
        "generate": (partial(generate, model, processor), whole),
        "stream_generate": (all_pieces, whole),
        "GenerationConfig": (GenerationConfig, {**settings, "stop": "x"}),
        "PrefixCache": (with_prefix_cache, {"max_bytes": 10**6}),
        "processor": (
            processor,
            {"images": PICTURE, "prompts": "What?", "resolution": 64, "system": None, "allow": None},
        ),
        "processor of lists": (processor, {"images": [PICTURE], "prompts": ["What?"], "resolution": 64}),
        "prepare": (prepared, {"images": PICTURE, "prompt": "What?", "resolution": 64, "system": None}),
        "prepare_images": (processor.prepare_images, {"images": [PICTURE], "resolution": 64}),
        "encode": (processor.encode, {"prompt": "What?", "n_images": 1, "system": None}),
        "decode": (processor.decode, {"token_ids": [1, 2]}),
        "batch_decode": (processor.batch_decode, {"rows": [[1]]}),
        "FastVLM.generate": (model.generate, {**rows, **settings, "config": None}),
        "FastVLM.embed": (model.embed, {**rows, "visual_tokens": None}),
        "FastVLM.prefill": (model.prefill, {**rows, "visual_tokens": None}),
        "FastVLM.encode_image": (model.encode_image, {"pixel_values": pixels}),
    }


def _writing(room: Room) -> dict[str, Call]:
    """Everything that takes a checkpoint, a file or settings for one."""
    folder, model = room.folder("apple"), room.model()
    written = {"source": folder, "destination": room.out}
    bits = {"preset": None, "bits": 8, "group_size": 32, "mode": "affine", "parts": {}, "target_bpw": None}
    converted = {"dtype": "float32", "revision": None, "vision_from": None}
    quantized = {"quantization": Quantization(bits=8, group_size=32), "calibration": (), "gates": ("top1>=0",)}
    scored = {"questions": [BadRow(line=1, reason="no")], "metric": "exact", "limit": 1, "resolution": 64}

    def planned(**arguments: Any) -> Any:
        return str(plan(**arguments))

    return {
        "load": (load, {"name": folder, "dtype": "float32", "revision": None, "notify": None, "lazy": True}),
        "from_pretrained": (FastVLMProcessor.from_pretrained, {"name": folder}),
        "convert_checkpoint": (convert_checkpoint, {**written, **converted}),
        "plan": (planned, {"source": folder, **converted}),
        "Quantization": (Quantization, {**bits, "method": "rtn"}),
        "quantize_checkpoint": (quantize_checkpoint, {**written, **quantized}),
        "convert_and_quantize": (convert_and_quantize, {**written, **quantized, "dtype": "float32"}),
        "evaluate": (partial(evaluate, *model), {**scored, "max_tokens": 1}),
        "read_questions": (read_questions, {"path": room.input / "q.jsonl"}),
    }


def python(random: Random, room: Room) -> None:
    """A public function with one or two arguments of the wrong kind or out of range."""
    calls = _asking(room) if random.random() < 0.7 else _writing(room)
    function, right = calls[random.choice(list(calls))]
    changed = random.sample(list(right), min(len(right), random.choice((1, 1, 1, 2))))
    function(**{**right, **{name: random.choice(_PYTHON) for name in changed}})
    room.written.update(path.parent for path in room.path.rglob("model.safetensors"))
