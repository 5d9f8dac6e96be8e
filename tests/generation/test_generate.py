"""Streaming, stopping, sampling, and the statistics that a result carries."""

import threading

import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.checkpoint.load import load
from fastvlm_mlx.convert import convert_checkpoint
from fastvlm_mlx.engine.decode import Sampler, SamplingConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache, prefix_key
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.generation.generate import StopStrings, generate, stream_generate
from tests.checkpoints import GOLDEN, SOURCES

PICTURE = GOLDEN / "apple" / "images" / "landscape.png"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "apple"
    convert_checkpoint(SOURCES["apple"], folder, dtype="float32")
    return load(folder)


def test_pieces_add_up_to_the_answer(loaded):
    pieces = list(stream_generate(*loaded, image=PICTURE, max_tokens=20))
    whole = generate(*loaded, image=PICTURE, max_tokens=20)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert [piece.generated_tokens for piece in pieces] == sorted(piece.generated_tokens for piece in pieces)


def test_a_result_says_how_long_each_stage_took(loaded):
    result = generate(*loaded, image=PICTURE, max_tokens=5)
    timings = result.timings
    assert result.finish_reason == "length"
    assert result.generated_tokens == 5
    assert 0 < timings["preprocess"] < timings["ttft"]
    assert timings["total"] >= timings["ttft"] + timings["decode"]
    assert result.tokens_per_second == pytest.approx(4 / timings["decode"])


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_both_end_tokens_stop(loaded, monkeypatch, eos):
    model, processor = loaded
    end = processor.tokenizer.token_id(eos)
    head = model.language_model.prefill

    def forced(embeddings, cache):
        return mx.where(mx.arange(384) == end, 1e4, head(embeddings, cache))

    monkeypatch.setattr(type(model.language_model), "prefill", lambda self, *args: forced(*args))
    result = generate(model, processor, image=PICTURE, max_tokens=5)
    assert (result.text, result.token_ids, result.finish_reason, result.generated_tokens) == ("", (), "stop", 1)


def test_a_stop_string_ends_the_answer_before_it(loaded):
    whole = generate(*loaded, image=PICTURE, max_tokens=20).text
    stop = whole[5:8]
    cut = generate(*loaded, image=PICTURE, max_tokens=20, stop=["never there", stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    pieces = list(stream_generate(*loaded, image=PICTURE, max_tokens=20, stop=stop))
    assert "".join(piece.text for piece in pieces) == cut.text


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        (("END",), ["abcE", "N", "Dxyz"], ["abc", "", ""]),
        (("END",), ["abcE", "N", "xyz"], ["abc", "", "ENxyz"]),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""]),
        (("\n\n", "."), ["one\n", "two.", "three"], ["one", "\ntwo"]),
        ((), ["abc"], ["abc"]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop, pieces, shown):
    stream, got = StopStrings(stop), []
    for piece in pieces:
        text, ended = stream.add(piece)
        got.append(text)
        if ended:
            break
    assert got == shown


def test_a_question_without_an_image_is_answered(loaded):
    result = generate(*loaded, prompt="Hello.", max_tokens=3)
    assert result.visual_tokens == 0
    assert result.generated_tokens == 3


def test_a_conversation_goes_on(loaded):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    ]
    once = generate(*loaded, image=PICTURE, prompt=messages, max_tokens=3)
    alone = generate(*loaded, image=PICTURE, prompt="What colour?", max_tokens=3)
    assert once.visual_tokens == alone.visual_tokens == 4
    assert once.prompt_tokens > alone.prompt_tokens


def test_a_seed_repeats_an_answer_and_another_changes_it(loaded):
    def answer(seed):
        return generate(*loaded, image=PICTURE, max_tokens=12, temperature=1.0, seed=seed).token_ids

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_the_answer_ends_with_the_context(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(processor, "context_length", 40)
    result = generate(model, processor, image=PICTURE, max_tokens=100)
    assert result.generated_tokens == 40 - result.prompt_tokens
    assert result.finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, ConfigError, "temperature must be at least 0, not -1.0"),
        ({"temperature": float("nan")}, ConfigError, "temperature must be at least 0, not nan"),
        ({"top_p": 0.0}, ConfigError, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, ConfigError, "top_p must be above 0 and at most 1, not 1.5"),
        ({"min_p": 2.0}, ConfigError, "min_p must be between 0 and 1, not 2.0"),
        ({"top_k": -1}, ConfigError, "top_k must be at least 0, not -1"),
        ({"repetition_penalty": 0.0}, ConfigError, "repetition_penalty must be above 0, not 0.0"),
        ({"stop": ["ok", ""]}, PromptError, "a stop string is empty"),
        ({"resolution": 100}, ConfigError, "100"),
        ({"prompt": ""}, PromptError, "empty"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(loaded, arguments, error, message):
    with pytest.raises(error, match=message):
        stream_generate(*loaded, **{"image": PICTURE, **arguments})


LOGITS = mx.array([[1.0, 3.0, 2.0, 0.0, -1.0, 2.5]])


def kept(**settings):
    """The tokens that can still be drawn."""
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=0, **settings), [[]])
    return set(np.flatnonzero(np.isfinite(np.array(sampler._filtered(LOGITS))[0])).tolist())


def test_filters_keep_what_their_definitions_say():
    probabilities = np.exp(np.array(LOGITS[0])) / np.exp(np.array(LOGITS[0])).sum()
    assert kept() == set(range(6))
    assert kept(top_k=2) == {1, 5}
    assert kept(min_p=float(probabilities[2] / probabilities[1]) * 0.99) == {1, 5, 2}
    assert kept(top_p=float(probabilities[1]) * 0.5) == {1}
    assert kept(top_p=float(probabilities[1]) * 1.01) == {1, 5}
    assert kept(top_p=0.999999) == set(range(6))


def test_samples_follow_the_tempered_distribution():
    rows = mx.broadcast_to(LOGITS, (20000, 6))
    tokens = np.array(Sampler(SamplingConfig(temperature=0.7, seed=3), [[]] * 20000)(rows))
    weights = np.exp(np.array(LOGITS[0]) / 0.7)
    # Four standard deviations of a proportion over 20,000 draws are 0.014.
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / 20000, weights / weights.sum(), atol=0.015)


def test_a_repetition_penalty_counts_prompt_and_answer():
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0), [[1]])
    assert [int(sampler(LOGITS).item()) for _ in range(3)] == [5, 2, 1]


def test_weights_that_are_read_when_they_are_used_give_the_same_answer(loaded, tmp_path):
    folder = tmp_path / "apple"
    convert_checkpoint(SOURCES["apple"], folder, dtype="float16")
    known = generate(*load(folder, dtype="float32"), image=PICTURE, max_tokens=20)
    model, processor = load(folder, dtype="float32", lazy=True)
    mx.eval(model.vision_tower.parameters())
    decoder = sum(value.nbytes for _, value in tree_flatten(model.language_model.parameters()))
    before = mx.get_active_memory()
    answer = generate(model, processor, image=PICTURE, max_tokens=20)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)
    assert mx.get_active_memory() - before > 0.9 * decoder


def test_a_first_answer_does_not_keep_the_tower_waiting_for_the_tokenizer(loaded, tmp_path, monkeypatch):
    known = generate(*loaded, image=PICTURE, max_tokens=5)
    folder = tmp_path / "apple"
    convert_checkpoint(SOURCES["apple"], folder, dtype="float32")
    model, processor = load(folder, lazy=True)
    encoded, encode, build = threading.Event(), type(model).encode_image, type(processor.tokenizer)._build

    def encode_and_tell(*args, **kwargs):
        visual_tokens = encode(*args, **kwargs)
        encoded.set()
        return visual_tokens

    def wait_and_build(self):
        assert encoded.wait(60)
        return build(self)

    monkeypatch.setattr(type(model), "encode_image", encode_and_tell)
    monkeypatch.setattr(type(processor.tokenizer), "_build", wait_and_build)
    answer = generate(model, processor, image=PICTURE, max_tokens=5)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)


@pytest.mark.skipif(device() != "cpu", reason="a GPU runs everything as one graph and frees nothing")
def test_the_tower_is_freed_when_it_has_seen_the_last_images(loaded, tmp_path):
    known = generate(*loaded, image=PICTURE, max_tokens=20)
    folder = tmp_path / "apple"
    convert_checkpoint(SOURCES["apple"], folder, dtype="float32")
    model, processor = load(folder)
    tower = sum(value.nbytes for _, value in tree_flatten(model.vision_tower.parameters()))
    before = mx.get_active_memory()
    answer = generate(model, processor, image=PICTURE, max_tokens=20, last_images=True)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)
    assert before - mx.get_active_memory() > 0.5 * tower  # the keys and values of the prompt have been added
    again = generate(model, processor, image=PICTURE, max_tokens=20)  # its tokens are known
    assert again.text == known.text
    with pytest.raises(RuntimeError, match="was freed"):
        generate(model, processor, image=GOLDEN / "apple" / "images" / "square.png")


def test_a_second_question_about_an_image_continues_from_the_first(loaded, monkeypatch):
    model, processor = loaded
    model.prefixes.clear()
    first = generate(model, processor, image=PICTURE, prompt="What is it?", max_tokens=4)
    prefills = []
    prefill = type(model).prefill
    monkeypatch.setattr(
        type(model), "prefill", lambda self, *args, **kw: prefills.append(args) or prefill(self, *args, **kw)
    )
    second = generate(model, processor, image=PICTURE.read_bytes(), prompt="Where is it?", max_tokens=4)
    ((ids, pixels),) = prefills
    assert first.reused_tokens == 0
    assert second.reused_tokens == second.prompt_tokens - len(ids) >= 14 + 4 + 1
    assert pixels is None
    assert len(ids) <= len(processor.encode("Where is it?", 1)) - 15
    alone = generate(model, processor, image=PICTURE, prompt="Where is it?", max_tokens=4, reuse=False)
    assert (second.text, second.token_ids, alone.reused_tokens) == (alone.text, alone.token_ids, 0)


def test_questions_may_be_asked_before_others_are_answered(loaded):
    model, processor = loaded
    alone = generate(model, processor, image=PICTURE, prompt="Where is it?", max_tokens=4, reuse=False)
    model.prefixes.clear()
    streams = [
        stream_generate(model, processor, image=PICTURE, prompt=p, max_tokens=4) for p in ("What?", "Where is it?")
    ]
    first, second = (list(stream) for stream in streams)
    assert (first[-1].reused_tokens, second[-1].reused_tokens > 4) == (0, True)
    assert tuple(token for piece in second for token in piece.token_ids) == alone.token_ids


def test_continuing_gives_the_logits_of_starting_anew(loaded):
    model, processor = loaded
    cache = PrefixCache()
    before = processor([PICTURE], "What is it?")
    now = processor([PICTURE], "Where is the dog?")
    keys = [prefix_key(inputs["input_ids"][0].tolist(), inputs["pixel_values"]) for inputs in (before, now)]
    cache.store(keys[0], model.prefill(**before)[1])
    reused, known = cache.match(keys[1], 4)
    logits = model.prefill(now["input_ids"][:, reused:], cache=known)[0]
    # Float32 sums over other shapes; a wrong position or token moves logits by whole units.
    np.testing.assert_allclose(logits, model.prefill(**now)[0], rtol=0, atol=1e-4)


def test_an_overwritten_picture_gets_its_own_answer(loaded, tmp_path):
    path = tmp_path / "picture.png"
    texts = []
    for name in ("landscape", "square", "landscape"):
        path.write_bytes((GOLDEN / "apple" / "images" / f"{name}.png").read_bytes())
        once = generate(*loaded, image=path, max_tokens=12)
        assert once.token_ids == generate(*loaded, image=path, max_tokens=12, reuse=False).token_ids
        texts.append(once.text)
    assert texts[0] == texts[2] != texts[1]


def test_other_pixels_sizes_and_systems_share_only_what_is_equal(loaded):
    model, processor = loaded
    model.prefixes.clear()
    generate(model, processor, image=PICTURE, max_tokens=1)
    reused = [
        generate(model, processor, image=PICTURE, max_tokens=1, **changed).reused_tokens
        for changed in ({"resolution": 192}, {"system": "Be brief."}, {})
    ]
    system = processor.encode("x", 1).index(-200)
    assert reused[0] == system
    assert reused[1] < system
    assert reused[2] == 30


def test_reuse_is_bounded_in_bytes(loaded):
    model, processor = loaded
    inputs = processor([PICTURE], "What is it?")
    ids = inputs["input_ids"][0].tolist()
    filled = model.prefill(**inputs)[1]
    one = sum(layer.nbytes for layer in filled)
    cache = PrefixCache(max_bytes=2 * one)
    keys = [prefix_key(ids, inputs["pixel_values"] + np.uint8(n)) for n in range(3)]
    for key in keys:
        cache.store(key, filled)
        assert cache.nbytes <= 2 * one
    known = [cache.match(key, 4)[0] for key in keys]
    assert known[0] < known[1] == known[2] == len(ids) - 1
    off = PrefixCache(max_bytes=0)
    off.store(keys[0], filled)
    assert off.match(keys[0], 4) == (0, None)
