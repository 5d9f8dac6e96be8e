"""An engine answers each request as `generate` alone does."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from fastvlm_mlx import (
    ConfigError,
    Engine,
    GenerationConfig,
    ImageError,
    PrefixCache,
    PromptError,
    QueueFullError,
    Request,
    generate,
)
from fastvlm_mlx.generation.words import count_words
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"
WORDS = "What is in the picture where how many dogs describe it briefly please".split()


def random_request(rng):
    """Of any length, with 0 to 3 images of few kinds, at one of three resolutions, sampled or greedy."""
    images = [
        np.random.default_rng(number).integers(0, 256, (40 + number, 70 - number, 3), np.uint8)
        for number in rng.integers(0, 6, rng.choice([0, 1, 1, 1, 2, 3]))
    ]
    config = GenerationConfig(
        max_tokens=int(rng.integers(1, 24)),
        temperature=float(rng.choice([0.0, 0.7, 1.3])),
        top_p=float(rng.choice([0.8, 1.0])),
        top_k=int(rng.choice([0, 5])),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        presence_penalty=float(rng.choice([0.0, 0.0, 1.5])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.4])),
        logit_bias={int(rng.integers(0, 384)): float(rng.uniform(-9, 9))} if rng.random() < 0.3 else {},
        logprobs=int(rng.integers(0, 5)) if rng.random() < 0.3 else None,
        seed=int(rng.integers(2**32)),
        stop=tuple(rng.choice(["e", "a ", "\n", "qu"], rng.choice([0, 0, 1, 2]), replace=False).tolist()),
        ignore_eos=bool(rng.choice([False, True])),
    )
    return Request(
        image=images,
        prompt=" ".join(rng.choice(WORDS, rng.integers(1, 12))),
        system=str(rng.choice(["Be brief.", "You are kind."])) if rng.random() < 0.3 else None,
        resolution=int(rng.choice([64, 128, 192])),
        config=config,
    )


def alone(model, processor, request):
    """What `generate` answers."""
    return generate(
        model,
        processor,
        image=request.image,
        prompt=request.prompt,
        system=request.system,
        resolution=request.resolution,
        config=request.config,
    )


def seen(result):
    """All of an answer but its times."""
    return result.text, result.token_ids, result.finish_reason, result.generated_tokens, result.prompt_tokens


def check_logprobs(result, expected):
    """Checks that two answers report the same probabilities, up to the rounding of a batch."""
    assert [each.token_id for each in result.logprobs] == [each.token_id for each in expected.logprobs]
    for mine, other in zip(result.logprobs, expected.logprobs, strict=True):
        values = [[each.logprob, *(value for _, value in each.top)] for each in (mine, other)]
        np.testing.assert_allclose(*values, atol=1e-4)  # the tolerance of logits


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_every_answer_is_the_one_that_a_request_gets_alone(loaded, pytestconfig, max_batch):
    """Whatever arrives with it, before it and after it, and whatever is cancelled meanwhile."""
    count = pytestconfig.getoption("--requests") // 3
    rng = np.random.default_rng(max_batch)
    requests = [random_request(rng) for _ in range(count)]
    cancelled = rng.random(count) < 0.15
    with Engine(*loaded, max_batch=max_batch) as engine, ThreadPoolExecutor(3) as callers:
        handles = list(callers.map(engine.submit, requests))
        for handle, cancel in zip(handles, cancelled, strict=True):
            if cancel:
                handle.cancel()
        for handle, cancel in zip(handles, cancelled, strict=True):
            assert handle.wait(60)
            if not cancel:
                expected = alone(*loaded, handle.request)
                assert seen(handle.result()) == seen(expected)
                check_logprobs(handle.result(), expected)


def test_a_request_streams_the_pieces_of_its_answer(loaded):
    with Engine(*loaded) as engine:
        handle = engine.submit(Request(image=IMAGE, config=GenerationConfig(max_tokens=6)))
        pieces = list(handle)
        assert "".join(piece.text for piece in pieces) == handle.result().text
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert list(handle) == pieces


def test_an_answer_can_end_after_words_and_begin_as_the_caller_says(loaded):
    with Engine(*loaded) as engine:
        options = {"image": IMAGE, "prefix": "A photo:", "config": GenerationConfig(max_tokens=40, ignore_eos=True)}
        whole = engine.submit(Request(**options)).result()
        short = engine.submit(Request(**options, max_words=3)).result()
    assert whole.text == generate(*loaded, image=IMAGE, prefix="A photo:", max_tokens=40, ignore_eos=True).text
    assert whole.text.startswith(short.text)
    assert (count_words(short.text), short.finish_reason) == (3, "stop")
    assert short.generated_tokens < 40


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prefix": 5}, PromptError, "the prefix must be text, not int"),
        ({"prefix": "\ud800"}, PromptError, "the prefix is not valid Unicode"),
        ({"max_words": 0}, ConfigError, "max_words must be"),
        ({"prefix": "one two", "max_words": 2}, ConfigError, "the prefix has 2 of 2 words, and leaves none"),
        ({"opening": 5}, ConfigError, "opening must be a function or None"),
        ({"prefix": "{", "schema": "json"}, ConfigError, "leave prefix out"),
        ({"max_words": 3, "schema": "json"}, ConfigError, "leave max_words out"),
    ],
)
def test_impossible_fields_are_refused_when_a_request_is_made(fields, error, message):
    if "schema" in fields:
        pytest.importorskip("llguidance")
    with pytest.raises(error, match=message):
        Request(image=IMAGE, **fields)


def test_one_bad_request_fails_alone(loaded):
    with Engine(*loaded) as engine:
        bad = engine.submit(Request(image="nowhere.png"))
        long = engine.submit(Request(prompt="word " * 40_000))
        good = engine.submit(Request(image=IMAGE, config=GenerationConfig(max_tokens=4)))
        with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
            bad.result(60)
        with pytest.raises(PromptError, match="the context has"):
            long.result(60)
        assert good.result(60).generated_tokens == 4


def test_a_cancelled_request_ends_and_leaves_room(loaded):
    endless = Request(config=GenerationConfig(max_tokens=20_000, ignore_eos=True))
    with Engine(*loaded, max_batch=1) as engine:
        handle = engine.submit(endless)
        next(iter(handle))
        handle.cancel()
        with pytest.raises(CancelledError):
            handle.result(60)
        assert engine.submit(Request(config=GenerationConfig(max_tokens=2))).result(60).generated_tokens == 2


def test_a_full_queue_pushes_back(loaded):
    endless = Request(config=GenerationConfig(max_tokens=20_000, ignore_eos=True))
    with Engine(*loaded, max_batch=1, queue_size=1) as engine:
        handles = [engine.submit(endless), engine.submit(endless)]
        with pytest.raises(QueueFullError, match="the engine's queue is full"):
            engine.submit(endless, wait=False)
        waiting = threading.Thread(target=lambda: handles.append(engine.submit(endless)))
        waiting.start()
        handles[0].cancel()
        waiting.join(60)
        assert len(handles) == 3


def test_map_takes_only_so_many_requests_ahead(loaded):
    taken = []

    def requests():
        for number in range(40):
            taken.append(number)
            yield Request(prompt=f"{number}", config=GenerationConfig(max_tokens=1))

    with Engine(*loaded, max_batch=2, queue_size=2) as engine:
        for number, handle in enumerate(engine.map(requests())):
            assert handle.request.prompt == f"{number}"
            assert len(taken) <= number + 2 * 4 + 1
        assert len(taken) == 40


def test_closing_ends_what_is_not_done(loaded):
    before = set(threading.enumerate())
    engine = Engine(*loaded, max_batch=1)
    endless = Request(config=GenerationConfig(max_tokens=20_000, ignore_eos=True))
    handles = [engine.submit(endless)]
    next(iter(handles[0]))  # of requests that arrive together, either may be prepared first
    handles += [engine.submit(endless), engine.submit(endless)]
    engine.close()
    for handle in handles:
        with pytest.raises(CancelledError):
            handle.result(1)
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.submit(Request())
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fastvlm-")]


def test_questions_about_one_picture_show_it_to_the_tower_once(loaded, monkeypatch):
    model = loaded[0]
    shown = []
    encode_image = type(model).encode_image
    monkeypatch.setattr(
        type(model), "encode_image", lambda self, pixels: shown.append(len(pixels)) or encode_image(self, pixels)
    )
    requests = [Request(image=IMAGE, prompt=f"{word}?", config=GenerationConfig(max_tokens=3)) for word in WORDS[:5]]
    with Engine(*loaded, prefix_cache=PrefixCache()) as engine:
        results = [handle.result() for handle in engine.map(requests)]
    assert shown == [1]
    assert sum(result.reused_tokens > result.visual_tokens for result in results) == 4


@pytest.mark.parametrize("numbers", [{"max_batch": 0}, {"queue_size": -1}])
def test_an_engine_without_room_is_refused(loaded, numbers):
    with pytest.raises(ConfigError, match="at least"):
        Engine(*loaded, **numbers)


def test_a_handle_tells_what_it_has_without_waiting(loaded):
    with Engine(*loaded) as engine:
        handle = engine.submit(Request(image=IMAGE, config=GenerationConfig(max_tokens=6, ignore_eos=True)))
        handle.wait(60)
        pieces, done = handle.since(0)
        assert done
        assert pieces == list(handle)
        assert handle.since(len(pieces) - 1) == (pieces[-1:], True)
        assert handle.error is None
        cancelled = engine.submit(Request(config=GenerationConfig(max_tokens=20_000, ignore_eos=True)))
        cancelled.cancel()
        cancelled.wait(60)
        assert isinstance(cancelled.error, CancelledError)


def test_an_engine_tells_how_long_its_step_takes_and_whether_it_lives(loaded, monkeypatch):
    hold = threading.Event()
    with Engine(*loaded) as engine:
        assert (engine.is_alive, engine.step_seconds) == (True, 0.0)
        step = engine._worker._step
        monkeypatch.setattr(engine._worker, "_step", lambda: hold.wait(20) and step())
        handle = engine.submit(Request(config=GenerationConfig(max_tokens=1)))
        while engine.step_seconds == 0:
            pass
        before = engine.step_seconds
        assert engine.step_seconds > before
        hold.set()
        handle.result(20)
    assert not engine.is_alive


def test_a_handle_gets_the_visual_tokens_if_its_request_keeps_them(loaded):
    model, processor = loaded
    images = [APPLE / "images" / f"{name}.png" for name in ("landscape", "portrait")]
    expected = np.array(model.encode_image(processor.prepare_images(images)))
    config = GenerationConfig(max_tokens=2)
    with Engine(model, processor) as engine:
        kept = [engine.submit(Request(image=image, config=config, keep_visual_tokens=True)) for image in images]
        other = engine.submit(Request(image=APPLE / "images" / "square.png", config=config))
        for handle, tokens in zip(kept, expected, strict=True):
            handle.result()
            assert handle.visual_tokens.shape == (1, *tokens.shape)
            # The tower may see one image or two at once.
            np.testing.assert_allclose(handle.visual_tokens[0], tokens, rtol=0, atol=1e-4 * np.abs(tokens).max())
        other.result()
        assert other.visual_tokens is None
