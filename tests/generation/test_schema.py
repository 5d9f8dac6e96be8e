"""Answers that follow a schema, alone and among others."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx import Engine, GenerationConfig, PrefixCache, Request, SchemaError, generate, load, stream_generate
from fastvlm_mlx.engine import scheduler as scheduling
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.model.language import Qwen2
from tests.structured.random_schemas import random_schema

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

SCENE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["cube", "ball", "circle", "square"]},
        "colours": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 2},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
    },
    "required": ["shape", "colours", "count"],
}
PICTURE = Path(fastvlm_mlx.__file__).parent / "demo_model" / "sample-2.png"
PROMPT = "What is in the picture?"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def seen(result):
    """All of an answer but its times."""
    return result.text, result.token_ids, result.finish_reason, result.generated_tokens


def random_request(rng, number):
    """With a schema or without, sampled or greedy, about one of three pictures or none."""
    config = GenerationConfig(
        max_tokens=int(rng.integers(1, 40)),
        temperature=float(rng.choice([0.0, 0.0, 0.8, 1.6])),
        top_p=float(rng.choice([0.9, 1.0])),
        top_k=int(rng.choice([0, 0, 5])),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        presence_penalty=float(rng.choice([0.0, 1.0])),
        logit_bias={int(rng.integers(300)): 50.0} if rng.random() < 0.2 else {},
        logprobs=1 if rng.random() < 0.2 else None,
        seed=number,
        stop=("e",) if rng.random() < 0.1 else (),
    )
    kind = rng.random()
    schema = None if kind < 0.4 else SCENE if kind < 0.7 else "json" if kind < 0.8 else random_schema(rng, 2)
    picture = rng.integers(0, 256, (64, 64, 3), np.uint8) if rng.random() < 0.7 else None
    return Request(image=picture, prompt=f"{PROMPT} {number % 5}", resolution=64, config=config, schema=schema), schema


def alone(loaded, request):
    return generate(
        *loaded,
        image=request.image,
        prompt=request.prompt,
        resolution=request.resolution,
        config=request.config,
        schema=request.schema,
    )


@pytest.mark.parametrize("max_batch", [2, 16])
def test_rows_with_a_schema_and_without_are_what_they_are_alone(loaded, pytestconfig, max_batch):
    rng = np.random.default_rng(max_batch)
    requests = [random_request(rng, number) for number in range(pytestconfig.getoption("--requests") // 3)]
    with Engine(*loaded, max_batch=max_batch) as engine:
        answers = [handle.result() for handle in engine.map(request for request, _ in requests)]
    for (request, schema), answer in zip(requests, answers, strict=True):
        assert seen(answer) == seen(alone(loaded, request))
        if schema is not None and answer.finish_reason == "stop" and not request.config.stop:
            value = json.loads(answer.text)
            jsonschema.Draft202012Validator(schema if isinstance(schema, dict) else {"type": "object"}).validate(value)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
def test_an_answer_is_json_of_its_schema(demo, options):
    pieces = list(stream_generate(*demo, image=PICTURE, prompt=PROMPT, schema=SCENE, **options))
    text = "".join(piece.text for piece in pieces)
    jsonschema.validate(json.loads(text), SCENE)
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    assert [piece.finish_reason for piece in pieces[-2:]] == [None, "stop"]
    assert sum(len(piece.token_ids) for piece in pieces) == pieces[-1].generated_tokens, "it needs no end token"


def test_an_answer_that_is_cut_says_so(demo):
    result = generate(*demo, prompt=PROMPT, schema=SCENE, max_tokens=9)
    assert result.finish_reason == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(result.text)
    whole = generate(*demo, prompt=PROMPT, schema=SCENE)
    exact = generate(*demo, prompt=PROMPT, schema=SCENE, max_tokens=whole.generated_tokens)
    assert exact.finish_reason == "stop", "an answer that is complete with its last token is not cut"


def test_a_stop_string_still_ends_an_answer(demo):
    result = generate(*demo, prompt=PROMPT, schema=SCENE, stop='"colours"')
    assert (result.finish_reason, result.stop_string) == ("stop", '"colours"')
    assert result.text.startswith('{"shape":"')
    assert result.text.endswith('",')


def test_logprobs_are_those_of_the_model_without_a_schema(demo):
    free = generate(*demo, prompt=PROMPT, max_tokens=1, logprobs=2)
    bound = generate(*demo, prompt=PROMPT, max_tokens=1, logprobs=2, schema=SCENE)
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.text == "{"
    assert bound.logprobs[0].logprob < free.logprobs[0].logprob


def test_a_bias_cannot_allow_what_a_schema_forbids(demo):
    token = demo[1].tokenizer.encode("x")[0]
    result = generate(*demo, prompt=PROMPT, schema=SCENE, logit_bias={token: 100})
    jsonschema.validate(json.loads(result.text), SCENE)


def test_rows_that_begin_again_go_on_in_their_schema(demo, monkeypatch):
    rng = np.random.default_rng(5)
    requests = [Request(prompt=f"{PROMPT} {n}", config=GenerationConfig(seed=n), schema=SCENE) for n in range(4)]
    requests += [Request(prompt=f"{PROMPT} {n}", config=GenerationConfig(max_tokens=30)) for n in range(4)]
    sample = scheduling.sample

    def failing(*arguments):
        if rng.random() < 0.1 and len(arguments[1]) > 1:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        return sample(*arguments)

    expected = [seen(alone(demo, request)) for request in requests]
    monkeypatch.setattr(scheduling, "sample", failing)
    with Engine(*demo, max_batch=8, prefix_cache=PrefixCache()) as engine:
        handles = [engine.submit(request) for request in requests]
        answers = [seen(handle.result()) for handle in handles]
    assert answers == expected


@pytest.mark.parametrize(
    ("at_once", "order"),
    [(False, ["read", "submit", *("submit", "read") * 2, "read"]), (True, ["read", *("submit", "read") * 3])],
    ids=["submitted", "computed at once"],
)
def test_next_logits_come_before_the_latest_tokens_are_read_unless_they_are_computed_at_once(
    demo, monkeypatch, at_once, order
):
    """The first token is read before anything else in any case."""
    monkeypatch.setattr(Qwen2, "steps_at_once", at_once)
    events = []
    forward, read = Scheduler._forward, scheduling.read_tokens
    monkeypatch.setattr(Scheduler, "_forward", lambda *arguments: events.append("submit") or forward(*arguments))
    monkeypatch.setattr(scheduling, "read_tokens", lambda tokens: events.append("read") or read(tokens))
    with Engine(*demo) as engine:
        engine.submit(Request(prompt=PROMPT, schema=SCENE, config=GenerationConfig(max_tokens=4))).result()
    assert events == order


def test_a_schema_that_turns_out_too_complex_fails_alone(demo, monkeypatch):
    from fastvlm_mlx.structured.grammar import Matcher

    advance = Matcher.advance

    def failing(self, token):
        if self.allowed.sum() < 20 and not self.complete:
            raise SchemaError("the schema is too complex to be followed (x); simplify it")
        advance(self, token)

    free = Request(prompt=PROMPT, config=GenerationConfig(max_tokens=20))
    expected = seen(alone(demo, free))
    monkeypatch.setattr(Matcher, "advance", failing)
    with Engine(*demo) as engine:
        handles = [engine.submit(free), engine.submit(Request(prompt=PROMPT, schema=SCENE)), engine.submit(free)]
        with pytest.raises(SchemaError, match="too complex"):
            handles[1].result()
        assert [seen(handles[place].result()) for place in (0, 2)] == [expected] * 2
