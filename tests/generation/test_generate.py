"""Streaming, stopping, sampling, and the statistics that a result carries."""

import threading

import pytest
from mlx.utils import tree_flatten
from PIL import Image

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError, PromptError
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.generate import generate, stream_generate
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.inputs.sources import Allow
from fastvlm_mlx.resolve import load
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"


def test_pieces_add_up_to_the_answer(loaded):
    pieces = list(stream_generate(*loaded, image=IMAGE, max_tokens=20))
    whole = generate(*loaded, image=IMAGE, max_tokens=20)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert [piece.generated_tokens for piece in pieces] == sorted(piece.generated_tokens for piece in pieces)


def test_each_token_comes_with_its_probability(loaded):
    pieces = list(stream_generate(*loaded, image=IMAGE, max_tokens=20, logprobs=3))
    for piece in pieces:
        assert [each.token_id for each in piece.logprobs] == list(piece.token_ids)
    whole = generate(*loaded, image=IMAGE, max_tokens=20, logprobs=3)
    assert whole.logprobs == tuple(each for piece in pieces for each in piece.logprobs)
    assert len(whole.logprobs) == 20
    for token_id, logprob, top in whole.logprobs:
        assert top[0] == (token_id, logprob), "a greedy answer takes the most probable token"
        assert 0 >= top[0][1] >= top[1][1] >= top[2][1]
    assert generate(*loaded, image=IMAGE, max_tokens=3).logprobs == ()


def test_messages_may_name_files_only_where_the_caller_allows_it(loaded):
    part = {"type": "image_url", "image_url": {"url": str(IMAGE)}}
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "Describe the image."}]}]
    with pytest.raises(ImageError, match=r"landscape\.png: files may not be read here; allow=Allow\(files=True\)"):
        generate(*loaded, prompt=prompt, max_tokens=5)
    with pytest.raises(ImageError, match="files may not be read here"):
        generate(*loaded, image=IMAGE, allow=Allow.DATA_ONLY, max_tokens=5)
    answer = generate(*loaded, prompt=prompt, allow=Allow.ALL, max_tokens=5)
    assert answer.token_ids == generate(*loaded, image=IMAGE, max_tokens=5).token_ids


def test_a_result_says_how_long_each_stage_took(loaded):
    result = generate(*loaded, image=IMAGE, max_tokens=5)
    timings = result.timings
    assert result.finish_reason == "length"
    assert result.generated_tokens == 5
    assert 0 < timings.preprocess < timings.ttft
    assert timings.total >= timings.ttft + timings.decode
    assert result.tokens_per_second == pytest.approx(4 / timings.decode)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_both_end_tokens_stop(loaded, monkeypatch, eos):
    model, processor = loaded
    end = processor.tokenizer.token_id(eos)
    head = model.language_model.prefill

    def forced(embeddings, cache):
        return mx.where(mx.arange(384) == end, 1e4, head(embeddings, cache))

    monkeypatch.setattr(type(model.language_model), "prefill", lambda self, *args: forced(*args))
    result = generate(model, processor, image=IMAGE, max_tokens=5)
    assert (result.text, result.token_ids, result.finish_reason, result.generated_tokens) == ("", (), "stop", 1)


def test_a_stop_string_ends_the_answer_before_it(loaded):
    whole = generate(*loaded, image=IMAGE, max_tokens=20).text
    stop = whole[5:8]
    cut = generate(*loaded, image=IMAGE, max_tokens=20, stop=["never there", stop])
    assert (cut.finish_reason, cut.stop_string) == ("stop", stop)
    assert cut.text == whole[: whole.index(stop)]
    pieces = list(stream_generate(*loaded, image=IMAGE, max_tokens=20, stop=stop))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert [piece.stop_string for piece in pieces] == [None] * (len(pieces) - 1) + [stop]


def test_a_prefix_is_continued_and_not_counted(loaded):
    _, processor = loaded
    plain = generate(*loaded, image=IMAGE, max_tokens=6)
    forced = generate(*loaded, image=IMAGE, max_tokens=6, prefix="A photo of ")
    tokens = processor.tokenizer.encode("A photo of")
    assert forced.text == "A photo of" + processor.decode(forced.token_ids)
    assert forced.generated_tokens == 6
    assert forced.prompt_tokens == plain.prompt_tokens + len(tokens)
    pieces = list(stream_generate(*loaded, image=IMAGE, max_tokens=6, prefix="A photo of"))
    assert "".join(piece.text for piece in pieces) == forced.text


def test_the_tokens_of_a_prefix_are_those_that_it_has_alone(loaded):
    _, processor = loaded
    whole = processor.prepare(None, "Hi", prefix="It is\n ")
    assert whole.input_ids == processor.encode("Hi") + processor.tokenizer.encode("It is\n")
    with pytest.raises(PromptError, match=r"the prompt has .* of text, which take at least"):
        _ = processor.prepare(None, "Hi", prefix="ab " * 10_000_000).input_ids


def test_a_question_without_an_image_is_answered(loaded):
    result = generate(*loaded, prompt="Hello.", max_tokens=3)
    assert result.visual_tokens == 0
    assert result.generated_tokens == 3


def test_a_background_changes_what_is_seen_of_a_transparent_image(loaded):
    image = Image.new("RGBA", (64, 64))
    white = generate(*loaded, image=Image.new("RGB", (64, 64), "white"), max_tokens=5)
    assert generate(*loaded, image=image, background="white", max_tokens=5).token_ids == white.token_ids
    request = Request(image=image, background="white", config=GenerationConfig(max_tokens=5))
    with Engine(*loaded) as engine:
        assert engine.submit(request).result(60).token_ids == white.token_ids
    with pytest.raises(ConfigError, match="background must be a colour such as white or #f0f0f0, not 'whit'"):
        generate(*loaded, image=image, background="whit", max_tokens=5)


def test_a_conversation_goes_on(loaded):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    ]
    once = generate(*loaded, image=IMAGE, prompt=messages, max_tokens=3)
    alone = generate(*loaded, image=IMAGE, prompt="What colour?", max_tokens=3)
    assert once.visual_tokens == alone.visual_tokens == 4
    assert once.prompt_tokens > alone.prompt_tokens


def test_a_seed_repeats_an_answer_and_another_changes_it(loaded):
    def answer(seed):
        return generate(*loaded, image=IMAGE, max_tokens=12, temperature=1.0, seed=seed).token_ids

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_the_answer_ends_with_the_context(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(processor, "context_length", 40)
    result = generate(model, processor, image=IMAGE, max_tokens=100)
    assert result.generated_tokens == 40 - result.prompt_tokens
    assert result.finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": "5"}, ConfigError, "max_tokens must be at least 1, not '5'"),
        ({"temperature": "hot"}, ConfigError, "temperature must be at least 0, not 'hot'"),
        ({"seed": -1}, ConfigError, r"seed must be from 0 to 2\*\*64 - 1, not -1"),
        ({"seed": 2**64}, ConfigError, r"seed must be from 0 to 2\*\*64 - 1"),
        ({"stop": [3]}, ConfigError, "stop must be strings"),
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
        stream_generate(*loaded, **{"image": IMAGE, **arguments})


def test_damaged_weights_give_an_error_and_no_answer(loaded, monkeypatch):
    model, processor = loaded
    norm, cache = model.language_model.model.norm, PrefixCache()
    monkeypatch.setitem(norm, "weight", mx.full(norm.weight.shape, mx.nan))
    for options in ({}, {"temperature": 1.0}, {"prefix_cache": cache}):
        with pytest.raises(FastVLMError, match="gives no numbers"):
            generate(model, processor, image=IMAGE, max_tokens=5, **options)
    with pytest.raises(FastVLMError, match="gives no numbers"):
        model.generate(**processor([IMAGE] * 2, ["What?", "Where is it?"]), max_tokens=5)
    assert len(cache) == 0


def test_an_answer_that_goes_wrong_later_ends_with_an_error(loaded, monkeypatch):
    model, processor = loaded
    stream = stream_generate(model, processor, image=IMAGE, max_tokens=8)
    known = [next(stream).token_ids for _ in range(2)]
    norm = model.language_model.model.norm
    monkeypatch.setitem(norm, "weight", mx.full(norm.weight.shape, mx.nan))
    with pytest.raises(FastVLMError, match="gives no numbers"):
        list(stream)
    assert all(known)


def test_weights_that_are_read_when_they_are_used_give_the_same_answer(converted):
    folder = converted("apple", "float16")
    known = generate(*load(folder, dtype="float32"), image=IMAGE, max_tokens=20)
    model, processor = load(folder, dtype="float32", lazy=True)
    mx.eval(model.vision_tower.parameters())
    decoder = sum(value.nbytes for _, value in tree_flatten(model.language_model.parameters()))
    before = mx.get_active_memory()
    answer = generate(model, processor, image=IMAGE, max_tokens=20)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)
    assert mx.get_active_memory() - before > 0.9 * decoder


def test_a_first_answer_does_not_keep_the_tower_waiting_for_the_tokenizer(loaded, converted, monkeypatch):
    known = generate(*loaded, image=IMAGE, max_tokens=5)
    model, processor = load(converted("apple"), lazy=True)
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
    answer = generate(model, processor, image=IMAGE, max_tokens=5)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)


@pytest.mark.skipif(device() != "cpu", reason="a GPU runs everything as one graph and frees nothing")
def test_the_tower_is_freed_when_it_has_seen_the_last_images(loaded, converted):
    known = generate(*loaded, image=IMAGE, max_tokens=20)
    model, processor = load(converted("apple"))
    tower = sum(value.nbytes for _, value in tree_flatten(model.vision_tower.parameters()))
    before = mx.get_active_memory()
    prefix_cache = PrefixCache()
    answer = generate(model, processor, image=IMAGE, max_tokens=20, prefix_cache=prefix_cache, free_tower=True)
    assert (answer.text, answer.token_ids) == (known.text, known.token_ids)
    assert before - mx.get_active_memory() > 0.5 * tower  # the keys and values of the prompt have been added
    again = generate(model, processor, image=IMAGE, max_tokens=20, prefix_cache=prefix_cache)
    assert again.text == known.text
    with pytest.raises(ConfigError, match="was freed"):
        generate(model, processor, image=APPLE / "images" / "square.png")


def test_a_second_question_about_an_image_continues_from_the_first(loaded, monkeypatch):
    model, processor = loaded
    shared = PrefixCache()
    first = generate(model, processor, image=IMAGE, prompt="What is it?", max_tokens=4, prefix_cache=shared)
    prefills = []
    prefill = type(model).prefill
    monkeypatch.setattr(
        type(model), "prefill", lambda self, *args, **kw: prefills.append(args) or prefill(self, *args, **kw)
    )
    second = generate(
        model, processor, image=IMAGE.read_bytes(), prompt="Where is it?", max_tokens=4, prefix_cache=shared
    )
    ((ids, pixels),) = prefills
    assert first.reused_tokens == 0
    assert second.reused_tokens == second.prompt_tokens - len(ids) >= 14 + 4 + 1
    assert pixels is None
    assert len(ids) <= len(processor.encode("Where is it?", 1)) - 15
    alone = generate(model, processor, image=IMAGE, prompt="Where is it?", max_tokens=4)
    assert (second.text, second.token_ids, alone.reused_tokens) == (alone.text, alone.token_ids, 0)


def test_questions_may_be_asked_before_others_are_answered(loaded):
    model, processor = loaded
    alone = generate(model, processor, image=IMAGE, prompt="Where is it?", max_tokens=4)
    shared = PrefixCache()
    streams = [
        stream_generate(model, processor, image=IMAGE, prompt=prompt, max_tokens=4, prefix_cache=shared)
        for prompt in ("What?", "Where is it?")
    ]
    first, second = (list(stream) for stream in streams)
    assert (first[-1].reused_tokens, second[-1].reused_tokens > 4) == (0, True)
    assert tuple(token for piece in second for token in piece.token_ids) == alone.token_ids


def test_an_overwritten_picture_gets_its_own_answer(loaded, tmp_path):
    path = tmp_path / "picture.png"
    texts, shared = [], PrefixCache()
    for name in ("landscape", "square", "landscape"):
        path.write_bytes((APPLE / "images" / f"{name}.png").read_bytes())
        once = generate(*loaded, image=path, max_tokens=12, prefix_cache=shared)
        assert once.token_ids == generate(*loaded, image=path, max_tokens=12).token_ids
        texts.append(once.text)
    assert texts[0] == texts[2] != texts[1]


def test_other_pixels_sizes_and_systems_share_only_what_is_equal(loaded):
    model, processor = loaded
    shared = PrefixCache()
    generate(model, processor, image=IMAGE, max_tokens=1, prefix_cache=shared)
    reused = [
        generate(model, processor, image=IMAGE, max_tokens=1, prefix_cache=shared, **changed).reused_tokens
        for changed in ({"resolution": 192}, {"system": "Be brief."}, {})
    ]
    system = processor.encode("x", 1).index(-200)
    assert reused[0] == system
    assert reused[1] < system
    assert reused[2] == 30


def test_keywords_and_a_config_mean_the_same(loaded):
    config = GenerationConfig(max_tokens=12, temperature=1.0, top_p=0.9, seed=7)
    given = generate(*loaded, image=IMAGE, config=config)
    same = generate(*loaded, image=IMAGE, max_tokens=12, temperature=1.0, top_p=0.9, seed=7)
    assert given.token_ids == same.token_ids
    other = generate(*loaded, image=IMAGE, config=config, max_tokens=3, stop=None)
    assert other.token_ids == given.token_ids[:3]


def test_an_unknown_keyword_is_refused(loaded):
    with pytest.raises(TypeError, match="max_token"):
        stream_generate(*loaded, image=IMAGE, max_token=5)


def test_end_tokens_can_be_ignored(loaded):
    model, processor = loaded
    whole = generate(model, processor, image=IMAGE, max_tokens=24)
    more = generate(model, processor, image=IMAGE, max_tokens=24, ignore_eos=True)
    assert more.generated_tokens == 24
    assert more.token_ids[: len(whole.token_ids)] == whole.token_ids


def test_a_cancelled_stream_leaves_the_next_one_alone(loaded):
    shared = PrefixCache()
    whole = generate(*loaded, image=IMAGE, max_tokens=20)
    for pieces in range(4):
        stream = stream_generate(*loaded, image=IMAGE, max_tokens=20, prefix_cache=shared)
        for _ in range(pieces):
            next(stream)
        stream.close()
        assert generate(*loaded, image=IMAGE, max_tokens=20, prefix_cache=shared).token_ids == whole.token_ids
