"""The whole model against what upstream's programs computed from the same weights, in float32."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastvlm_mlx.backend import mx
from fastvlm_mlx.generation.generate import generate
from fastvlm_mlx.resolve import load
from tests.checkpoints import GOLDEN, SOURCES

IMAGES = ("landscape", "large", "portrait", "square", "tiny")
APPLE = {"apple-train": "apple", "apple": "apple", "apple-untied": "apple_untied", "apple-hot": "apple_hot"}
TRANSFORMERS = {"transformers-train": "transformers_train", "transformers": "transformers_reparam"}


@pytest.fixture(scope="module")
def models(converted):
    return {name: load(converted(name)) for name in (*APPLE, *TRANSFORMERS, "mlx-vlm")}


def assert_close(got, expected, what=""):
    """Within 1e-4 of the largest magnitude: float32 sums in another order, through every layer."""
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=what)


def upstream(name):
    return load_file(GOLDEN / {**APPLE, **TRANSFORMERS, "mlx-vlm": "mlx_vlm"}[name] / "expected.safetensors")


def greedy(model, input_ids, pixel_values, count):
    """`count` most probable tokens one after another, end tokens among them."""
    logits, cache = model.prefill(input_ids, pixel_values)
    tokens = []
    for _ in range(count):
        tokens.append(int(mx.argmax(logits, axis=-1).item()))
        logits = model.language_model(mx.array([[tokens[-1]]]), cache)[:, -1]
    return tokens


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", APPLE)
def test_every_stage_agrees_with_apples_model(models, name, image):
    (model, processor), expected = models[name], upstream(name)
    pixels = np.moveaxis(expected[f"{image}.pixel_values"], 0, -1)[None]
    ids = processor.encode("Describe the image.", n_images=1)
    order = np.r_[0:256:2, 1:256:2]
    assert [token if token >= 0 else -200 for token in expected["input_ids"]] == ids
    # Both formulations: the modules, as a GPU runs them, and the one that the CPU runs.
    scale = model.config.vision_config.scales.conv_exp
    for tower in (model.vision_tower, model.tower):
        features = np.array(tower(mx.array(pixels))).reshape(4, 256) * scale
        assert_close(features, expected[f"{image}.features"][:, order], "features")
    assert_close(model.encode_image(pixels)[0], expected[f"{image}.projected"], "projected")
    assert_close(model.embed(ids, pixels)[0], expected[f"{image}.inputs_embeds"], "inputs_embeds")
    assert_close(model.prefill(ids, pixels)[0][0], expected[f"{image}.logits"], "logits")
    wanted = expected[f"{image}.greedy"].tolist()
    assert greedy(model, ids, pixels, len(wanted)) == wanted


@pytest.mark.parametrize("image", IMAGES)
def test_a_picture_and_a_prompt_give_apples_answer(models, image):
    model, processor = models["apple"]
    result = generate(
        model,
        processor,
        image=GOLDEN / "apple" / "images" / f"{image}.png",
        prompt="Describe the image.",
        max_tokens=24,
    )
    wanted = upstream("apple")[f"{image}.greedy"].tolist()
    answer = [token for token in wanted if token not in processor.eos_token_ids]
    assert list(result.token_ids) == answer
    assert result.text == processor.decode(answer)
    assert (result.prompt_tokens, result.visual_tokens) == (31, 4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_checkpoints_agree_with_transformers(models, name):
    (model, _), expected = models[name], upstream(name)
    pixels = np.moveaxis(expected["pixel_values"], 0, -1)[None]
    image_token = json.loads((SOURCES[name] / "config.json").read_text())["image_token_index"]
    ids = expected["input_ids"].tolist()
    first = ids.index(image_token)
    ids = [*ids[:first], -200, *ids[first + ids.count(image_token) :]]
    features = np.moveaxis(expected["features_nchw"], 0, -1).reshape(4, 256)[:, np.r_[0:256:2, 1:256:2]]
    assert_close(model.vision_tower(mx.array(pixels)).reshape(4, 256), features, "features")
    assert_close(model.encode_image(pixels)[0], expected["projected"], "projected")
    assert_close(model.prefill(ids, pixels)[0][0], expected["logits"], "logits")
    wanted = expected["greedy"].tolist()
    assert greedy(model, ids, pixels, len(wanted)) == wanted


def test_mlx_vlms_checkpoint_agrees_with_mlx_vlm(models):
    (model, processor), expected = models["mlx-vlm"], upstream("mlx-vlm")
    pixels = np.moveaxis(upstream("apple")["landscape.pixel_values"], 0, -1)[None]
    ids = processor.encode("Describe the image.", n_images=1)
    assert_close(model.embed(ids, pixels)[0], expected["fp32.inputs_embeds"])
    assert_close(model.prefill(ids, pixels)[0][0], expected["fp32.logits"])


def test_bytes_and_floats_are_the_same_picture(models):
    model, processor = models["apple"]
    pixels = processor.prepare_images([GOLDEN / "apple" / "images" / "landscape.png"])
    np.testing.assert_array_equal(
        model.encode_image(pixels),
        model.encode_image(np.moveaxis(upstream("apple")["landscape.pixel_values"], 0, -1)[None]),
    )


def test_several_images_are_spliced_in_their_order(models):
    model, processor = models["apple"]
    pictures = [GOLDEN / "apple" / "images" / f"{name}.png" for name in ("landscape", "portrait")]
    inputs = processor(pictures, "What changed?")
    embedded = np.array(model.embed(**inputs))[0]
    ids = inputs["input_ids"][0].tolist()
    first, second = (place for place, token in enumerate(ids) if token == -200)
    expected = upstream("apple")
    assert embedded.shape == (len(ids) + 2 * 3, 64)
    assert_close(embedded[first : first + 4], expected["landscape.projected"])
    assert_close(embedded[second + 3 : second + 7], expected["portrait.projected"])


def test_a_batch_answers_each_question_as_if_alone(models):
    model, processor = models["apple"]
    folder = GOLDEN / "apple" / "images"
    questions = [
        ([folder / "landscape.png"], "Describe the image."),
        ([folder / "tiny.png", folder / "square.png"], "What is the difference between these two?"),
        ([], "Hello."),
    ]
    inputs = processor([images for images, _ in questions], [prompt for _, prompt in questions])
    together = model.generate(**inputs, max_tokens=8)
    for (images, prompt), tokens in zip(questions, together, strict=True):
        assert tokens == model.generate(**processor(images, prompt), max_tokens=8)[0]
    assert (
        processor.batch_decode(together)[0]
        == generate(model, processor, image=folder / "landscape.png", prompt="Describe the image.", max_tokens=8).text
    )


@pytest.mark.parametrize("resolution", [64, 192, 256])
def test_any_multiple_of_64_works(models, resolution):
    model, processor = models["apple"]
    picture = GOLDEN / "apple" / "images" / "large.png"
    result = generate(model, processor, image=picture, resolution=resolution, max_tokens=2)
    assert result.visual_tokens == (resolution // 64) ** 2
    assert result.prompt_tokens == 27 + result.visual_tokens
