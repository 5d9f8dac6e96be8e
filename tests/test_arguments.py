"""Every public call checks its arguments: the wrong kind is an error that names it, None is the default."""

from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from fastvlm_mlx import (
    Allow,
    ConfigError,
    Engine,
    FastVLM,
    FastVLMProcessor,
    GenerationConfig,
    PrefixCache,
    PromptError,
    Request,
    choose,
    generate,
    load,
)
from fastvlm_mlx.arguments import checked_ids, file_path, flag, items, whole
from fastvlm_mlx.backend import mx
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"


def test_none_is_the_default_of_every_setting():
    names = [each.name for each in fields(GenerationConfig)]
    assert GenerationConfig(**dict.fromkeys(names)) == GenerationConfig()
    assert GenerationConfig.of(GenerationConfig(top_k=3), dict.fromkeys(names)) == GenerationConfig(top_k=3)


def test_none_is_the_default_of_every_argument(loaded):
    names = ("prompt", "image", "system", "resolution", "allow", "config", "prefix_cache", "free_tower")
    assert (
        generate(*loaded, max_tokens=3, **dict.fromkeys(names)).token_ids == generate(*loaded, max_tokens=3).token_ids
    )
    assert PrefixCache(None).max_bytes == PrefixCache().max_bytes
    assert Allow(files=None, urls=None, private_hosts=None) == Allow.DATA_ONLY
    assert Request(prompt=None, config=None).config == GenerationConfig()


def test_scalars_of_numpy_are_numbers(loaded):
    given = {"max_tokens": np.int64(4), "temperature": np.float32(0.5), "top_k": np.uint8(9), "seed": np.uint64(2**63)}
    more = {"logprobs": np.int8(2), "presence_penalty": np.float32(1), "logit_bias": {np.int64(3): np.float16(2)}}
    config = GenerationConfig(**given, **more, top_p=Fraction(1, 2), ignore_eos=np.bool_(True))
    kinds = {"max_tokens": int, "top_k": int, "seed": int, "logprobs": int, "stop": tuple, "logit_bias": tuple}
    for name, value in vars(config).items():
        assert type(value) is {**kinds, "ignore_eos": bool}.get(name, float)
    assert [type(number) for pair in config.logit_bias for number in pair] == [int, float]
    known = generate(*loaded, image=IMAGE, resolution=128, max_tokens=4, temperature=0.5, top_k=9, seed=2**63)
    assert generate(*loaded, image=IMAGE, resolution=np.int32(128), **given).token_ids == known.token_ids
    assert PrefixCache(np.int64(5)).max_bytes == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 10**400}, "temperature must be at least 0, not an integer of 1329 bits"),
        ({"temperature": Decimal(1)}, r"temperature must be at least 0, not Decimal\('1'\)"),
        ({"max_tokens": True}, "max_tokens must be at least 1, not True"),
        ({"max_tokens": np.array([1, 2])}, r"max_tokens must be at least 1, not array\(\[1, 2\]\)"),
        ({"seed": 10**5000}, r"seed must be from 0 to 2\*\*64 - 1, not an integer of 16610 bits"),
        ({"stop": 5}, "stop must be strings, not int"),
        ({"stop": b"x"}, "stop must be strings, not bytes"),
        ({"stop": np.array(5)}, "stop must be strings, not ndarray"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2, not 2.1"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be between -2 and 2, not '1'"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, not 21"),
        ({"logprobs": True}, "logprobs must be from 0 to 20, not True"),
        ({"logit_bias": 5}, "logit_bias must be a mapping of token ids and numbers from -100 to 100, not int"),
        ({"logit_bias": [5]}, "logit_bias must be pairs of token ids and numbers from -100 to 100, not 5"),
        ({"logit_bias": {"x": 5}}, "logit_bias must map token ids to numbers, not 'x'"),
        ({"logit_bias": {-1: 5}}, "logit_bias must map token ids to numbers, not -1"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be between -100 and 100, not 101"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1 must be between -100 and 100, not None"),
        ({"logit_bias": {384: 1}}, "logit_bias has token id 384, outside the vocabulary of 384"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, not 'no'"),
        ({"config": {"max_tokens": 5}}, "config must be a GenerationConfig, not dict"),
        ({"prefix_cache": True}, "prefix_cache must be a PrefixCache or None, not bool"),
        ({"free_tower": "yes"}, "free_tower must be True or False, not 'yes'"),
        ({"allow": "all"}, "allow must be an Allow or None, not str"),
        ({"resolution": "512"}, "resolution must be a whole number of pixels or 'auto', not '512'"),
        ({"resolution": np.array([64, 64])}, "resolution must be a whole number"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(loaded, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(*loaded, **options)


def test_a_misspelt_option_names_those_that_exist(loaded):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temp'; the options are max_tokens, temperature"):
        generate(*loaded, temp=0.5)


def test_model_and_processor_cannot_be_confused(loaded):
    model, processor = loaded
    for call in (generate, Engine, partial(choose, choices=["yes", "no"], prompt="Is it?")):
        with pytest.raises(ConfigError, match="model must be a FastVLM, the first of the two that load returns, not "):
            call(processor, model)
        with pytest.raises(ConfigError, match=r"processor must be a FastVLMProcessor, the second of the two.*not N"):
            call(model, None)


def test_prompt_and_image_may_be_given_by_position(loaded):
    given = generate(*loaded, "What is it?", IMAGE, max_tokens=4)
    assert given.token_ids == generate(*loaded, image=IMAGE, prompt="What is it?", max_tokens=4).token_ids


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": None}, PromptError, "input_ids must be whole numbers below"),
        ({"input_ids": [["a"]]}, PromptError, "input_ids must be whole numbers below"),
        ({"input_ids": [[1.5]]}, PromptError, "not float64"),
        ({"input_ids": [[10**30]]}, PromptError, "not object"),
        ({"input_ids": [[1, 2], [3]]}, PromptError, "input_ids cannot be read as an array: .*inhomogeneous"),
        ({"input_ids": [[[1]]]}, PromptError, r"input_ids must be \(B, T\) or, for one row, \(T,\), not \(1, 1, 1\)"),
        ({"input_ids": []}, PromptError, r"not \(0,\)"),
        ({"attention_mask": [[True]]}, PromptError, r"for each of the \(1, 3\) token ids, not bool of shape \(1, 1\)"),
        ({"attention_mask": [[0, 0, 0]]}, PromptError, "a row without tokens"),
        ({"attention_mask": [[0.5, 1, 1]]}, PromptError, "not float64"),
        ({"pixel_values": "a.png"}, ConfigError, r"pixel_values must be uint8, or float in \[0, 1\], not <U5"),
        ({"pixel_values": np.zeros((1, 64, 128, 3))}, ConfigError, "pixel_values must be square"),
        ({"config": "greedy"}, ConfigError, "config must be a GenerationConfig or a list of them, not str"),
        ({"config": [{}]}, ConfigError, "config must be a GenerationConfig, not dict"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(loaded, arguments, error, message):
    model, _ = loaded
    with pytest.raises(error, match=message):
        model.generate(**{"input_ids": [[5, 6, 7]], "max_tokens": 1, **arguments})


def test_parts_of_a_model_check_what_they_are_given(loaded):
    model, processor = loaded
    inputs = processor(IMAGE, "What?")
    with pytest.raises(ConfigError, match=r"visual_tokens must be \(images, N, 64\), not \(1, 4, 63\)"):
        model.embed(inputs["input_ids"], visual_tokens=mx.zeros((1, 4, 63)))
    with pytest.raises(ConfigError, match="visual_tokens must be floats, not int64"):
        model.embed(inputs["input_ids"], visual_tokens=[[[1]]])
    with pytest.raises(ConfigError, match=r"features must be \(B, R/64, R/64, 256\), not \(2,\)"):
        model.project([1.0, 2.0])
    with pytest.raises(ConfigError, match="cache must have an entry for each of the 2 layers, not 0"):
        model.prefill(inputs["input_ids"], inputs["pixel_values"], cache=[])
    with pytest.raises(ConfigError, match="on_submit must be a function or None, not int"):
        model.encode_image(inputs["pixel_values"], 5)
    visual_tokens = np.asarray(model.encode_image(inputs["pixel_values"]))
    embedded = np.asarray(model.embed(inputs["input_ids"], visual_tokens=visual_tokens))
    np.testing.assert_array_equal(embedded, np.asarray(model.embed(**inputs)))


def test_a_processor_checks_what_it_is_given(loaded):
    _, processor = loaded
    assert (
        processor.decode(processor.encode("Hi", 1)) == "system\nYou are a helpful assistant.\nuser\n\nHi\nassistant\n"
    )
    for wrong in ("ab", 5, None, [1.5], [[1]], np.array(1)):
        with pytest.raises(PromptError, match="token ids must be"):
            processor.decode(wrong)
    with pytest.raises(PromptError, match="token id 384 is outside the vocabulary of 384"):
        processor.batch_decode(np.array([[1, 2], [3, 384]]))
    with pytest.raises(PromptError, match="must be rows of whole numbers, not ndarray"):
        processor.batch_decode(np.array(3))
    with pytest.raises(ConfigError, match="n_images must be a whole number, from 0 to 8192, not -1"):
        processor.encode("Hi", -1)
    with pytest.raises(PromptError, match="turns must be a list of Turn"):
        processor.encode_turns("Hi")
    with pytest.raises(PromptError, match="a prompt must be a string or a list of messages, not bytes"):
        processor(None, b"Hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 5}, "the name of a checkpoint must be a path, not int"),
        ({"dtype": "float64"}, "dtype must be float16, bfloat16 or float32, not 'float64'"),
        ({"dtype": mx.int8}, "dtype must be .*, not 'int8'"),
        ({"dtype": ["float16"]}, r"dtype must be .*, not \['float16'\]"),
        ({"revision": 5}, "revision must be a text or None, not int"),
        ({"notify": "x"}, "notify must be a function or None, not str"),
        ({"progress": 1}, "progress must be a function or None, not int"),
        ({"lazy": "x"}, "lazy must be True or False, not 'x'"),
    ],
)
def test_load_checks_its_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(**{"name": "demo", **arguments})


def test_a_type_of_mlx_names_a_dtype(converted):
    model, _ = load(converted("apple"), dtype=mx.float16, lazy=True)
    assert model.dtype == mx.float16


@pytest.mark.parametrize("of", [FastVLM, FastVLMProcessor])
def test_from_pretrained_takes_any_path(converted, of):
    class Place:
        def __fspath__(self):
            return str(converted("apple"))

    assert isinstance(of.from_pretrained(Place()), of)


def test_helpers_say_what_they_expect():
    for call, message in (
        (lambda: whole(1.0, "n"), "n must be a whole number, at least 1, not 1.0"),
        (lambda: whole(9, "n", 0, 8), "n must be a whole number, from 0 to 8, not 9"),
        (lambda: flag(1, "on"), "on must be True or False, not 1"),
        (lambda: items({"a": 1}, "names"), "names must be a list, not dict"),
        (lambda: file_path(b"x", "folder"), "folder must be a path, not bytes"),
        (lambda: file_path("a\0b", "folder"), r"folder must be a path, not 'a\\x00b'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert checked_ids(np.array([1, 2]), 3) == checked_ids((1, 2), 3) == [1, 2]
