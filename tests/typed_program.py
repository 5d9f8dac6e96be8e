"""A user's program: `make lint` checks that it passes `mypy --strict`. It is never run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from fastvlm_mlx import (
    Allow,
    Engine,
    EvaluationReport,
    FastVLM,
    FastVLMError,
    FastVLMProcessor,
    GenerationConfig,
    GenerationResult,
    ImageSource,
    PrefixCache,
    Request,
    Timings,
    TokenLogprob,
    choose,
    evaluate,
    generate,
    load,
    read_questions,
    stream_generate,
)
from fastvlm_mlx.convert import Quantization, QuantizationReport, convert_checkpoint, quantize_checkpoint, verify


def places(folder: os.PathLike[str]) -> tuple[FastVLM, FastVLMProcessor]:
    """Every kind of name and of type."""
    load("apple/FastVLM-0.5B", dtype="float16", revision="main", notify=print, lazy=True)
    FastVLM.from_pretrained(folder, dtype=mx.float16)
    FastVLM.from_pretrained(Path("checkpoints"))
    FastVLMProcessor.from_pretrained(folder)
    return load(folder, dtype=mx.bfloat16)


def questions(model: FastVLM, processor: FastVLMProcessor) -> Iterator[str]:
    """Every kind of image, prompt and setting."""
    images: list[ImageSource] = ["a.jpg", Path("b.jpg"), b"", Image.new("RGB", (4, 4))]
    images += [np.zeros((4, 4, 3), np.uint8), mx.zeros((4, 4, 3))]
    for image in images:
        yield generate(model, processor, image=image, prompt="What?").text
    yield generate(model, processor, "What?", ["a.jpg", "b.jpg"], resolution="auto", allow=Allow.PUBLIC).text
    yield generate(model, processor, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).text
    config = GenerationConfig(max_tokens=64, temperature=0.7, stop=["\n"], seed=None)
    answer: GenerationResult = generate(model, processor, "Hi", config=config, top_p=None, stop=None)
    timings: Timings = answer.timings
    yield f"{timings.ttft} {answer.tokens_per_second} {answer.finish_reason}"
    for piece in stream_generate(model, processor, image="a.jpg", prefix_cache=PrefixCache(1 << 20), ignore_eos=True):
        yield piece.text
    yield str(
        [choice.probability for choice in choose(model, processor, ["yes", "no"], prompt="Is it?", image="a.jpg")]
    )
    try:
        with Engine(model, processor, max_batch=4) as engine:
            yield from (handle.result().text for handle in engine.map([Request(image="a.jpg")]))
    except FastVLMError as error:
        yield str(error)


class Animal:
    """Looks as pydantic's models do."""

    @classmethod
    def model_json_schema(cls, by_alias: bool = True, *, mode: str = "validation") -> dict[str, Any]:
        """The schema."""
        return {"type": "object", "properties": {"name": {"type": "string"}}}


def json_answers(model: FastVLM, processor: FastVLMProcessor) -> list[TokenLogprob]:
    """Schemas of every kind, and the probabilities of tokens."""
    answers = [generate(model, processor, image="a.jpg", schema=schema) for schema in ({"type": "object"}, Animal)]
    answers.append(generate(model, processor, "Hi", schema="json", logprobs=5, logit_bias={5: -1.0}))
    with Engine(model, processor) as engine:
        answers.append(engine.submit(Request(prompt="Hi", schema=Animal)).result())
    return [logprob for answer in answers for logprob in answer.logprobs if logprob.top[0][1] > -1.0]


def arrays(model: FastVLM, processor: FastVLMProcessor) -> list[str]:
    """Batches and parts."""
    inputs = processor(["a.jpg", None], ["What?", "Hi"], resolution=512)
    visual_tokens: mx.array = model.encode_image(inputs["pixel_values"])
    model.embed(inputs["input_ids"], visual_tokens=visual_tokens)
    model.generate([[1, 2], [3, 4]], config=[GenerationConfig(), GenerationConfig(seed=1)])
    return processor.batch_decode(model.generate(**inputs, max_tokens=5, temperature=0.5))


def checkpoints(folder: Path) -> str:
    """Conversion, quantization, comparison and evaluation."""
    convert_checkpoint("apple/FastVLM-0.5B", folder / "fp16", dtype="float16", calibration_images=["a.jpg"])
    int4 = Quantization(bits=4, group_size=64)
    report: QuantizationReport = quantize_checkpoint(folder / "fp16", folder / "q", int4, gates=["kl<1"])
    scores: EvaluationReport = evaluate(*load(folder / "q"), read_questions("questions.jsonl"), limit=10)
    assert verify(folder / "q", folder / "fp16").first_drift is None
    return f"{report.bits_per_weight} {scores.total.score}"
