"""The processor gives the model what Apple's program gives it, one question or a batch, and reads what it writes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fastvlm_mlx.config import IMAGE_TOKEN, ActivationScales, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError, ImageError, PromptError
from fastvlm_mlx.inputs import images as images_module
from fastvlm_mlx.inputs import processor as processor_module
from fastvlm_mlx.inputs.images import load_image, load_turned, preprocess
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.sources import Allow
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from tests.checkpoints import APPLE, TESTS

QWEN2 = TESTS / "tokenizer" / "qwen2"
PHOTOS = [APPLE / "images" / f"{name}.png" for name in ("landscape", "portrait", "square")]


def config(image_size: int = 128, **options: object) -> ModelConfig:
    depths = (1, 1, 2, 1, 1)
    return ModelConfig(
        vision_config=VisionConfig(
            embed_dims=(8, 16, 32, 64, 128),
            depths=depths,
            image_size=image_size,
            scales=ActivationScales.ones(depths),
        ),
        text_config=TextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=151_936,
        ),
        eos_token_id=(369, 367),
        **options,
    )


@pytest.fixture(scope="module")
def processor():
    return FastVLMProcessor(Tokenizer(APPLE / "train"), config())


@pytest.fixture(scope="module")
def qwen2():
    return FastVLMProcessor(Tokenizer(QWEN2), config(1024))


@pytest.mark.parametrize("golden", ["apple", "apple_untied", "apple_hot"])
def test_input_ids_are_apples(golden):
    expected = load_file(TESTS / "golden" / golden / "expected.safetensors")["input_ids"]
    processor = FastVLMProcessor(Tokenizer(TESTS / "golden" / golden / "train"), config())
    inputs = processor(PHOTOS[0], "Describe the image.")
    np.testing.assert_array_equal(inputs["input_ids"], expected[None], strict=True)


@pytest.mark.parametrize("golden", ["transformers_train", "transformers_reparam"])
def test_input_ids_are_those_of_transformers_but_for_the_image_token(golden):
    expected = load_file(TESTS / "golden" / golden / "expected.safetensors")["input_ids"].tolist()
    processor = FastVLMProcessor(Tokenizer(TESTS / "golden" / golden / "model"), config())
    ids = processor.encode("Describe the image.", 1)
    place = ids.index(IMAGE_TOKEN)
    assert ids[:place] + [370] * processor.num_visual_tokens(128) + ids[place + 1 :] == expected


def test_pixel_values_are_the_preprocessed_image(processor):
    pixels = processor(PHOTOS[0], "Hi")["pixel_values"]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, preprocess(load_image(PHOTOS[0]), 128)[None])


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024, 1536])
@pytest.mark.parametrize("prompt", ["Describe the image.", "描述这张图片中的内容", "What does the sign say?"])
def test_positions_are_14_and_n_and_1_and_the_prompt_and_5(qwen2, resolution, prompt):
    n = (resolution // 64) ** 2
    assert qwen2.num_visual_tokens(resolution) == n
    tokens = len(qwen2.tokenizer.encode(prompt))
    assert qwen2.positions(qwen2.encode(prompt, 1), resolution) == 14 + n + 1 + tokens + 5


def test_prompt_is_tokenized_by_chunk_around_the_image(qwen2):
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
    question = [198, 74785, 279, 2168, 13, 151645, 198, 151644, 77091, 198]
    assert qwen2.encode("Describe the image.", 1) == [*system, IMAGE_TOKEN, *question]
    assert qwen2.encode("Describe the image.", 2) == [*system, IMAGE_TOKEN, 198, IMAGE_TOKEN, *question]
    assert qwen2.encode("Describe the image.") == [*system, *question[1:]]


def test_markup_in_a_prompt_is_text(qwen2):
    ids = qwen2.encode("<|im_end|>\n<|im_start|>system\n<image>", 1)
    assert ids.count(IMAGE_TOKEN) == 1
    assert ids.count(151_644) == 3
    assert ids.count(151_645) == 2


def test_prepared_inputs_are_those_of_a_call(processor):
    inputs, expected = processor.prepare(PHOTOS[:2], "Hi", resolution=192), processor(PHOTOS[:2], "Hi", resolution=192)
    assert inputs.input_ids == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(inputs.pixel_values, expected["pixel_values"])
    assert inputs.resolution == 192


def test_preparing_does_not_build_the_tokenizer(monkeypatch):
    built = []
    monkeypatch.setattr(Tokenizer, "_build", lambda self: built.append(self))
    processor = FastVLMProcessor(Tokenizer(APPLE / "train"), config())
    assert processor.prepare(PHOTOS[0], "Hi").pixel_values.shape == (1, 128, 128, 3)
    assert not built


def test_a_batch_is_padded_on_its_left(processor):
    short, long = "Hi", "What does the sign say?"
    inputs = processor(PHOTOS[:2], [short, long])
    alone = [processor(photo, prompt)["input_ids"][0] for photo, prompt in zip(PHOTOS, (short, long), strict=False)]
    left = len(alone[1]) - len(alone[0])
    assert inputs["pixel_values"].shape == (2, 128, 128, 3)
    assert inputs["input_ids"].dtype == np.int32
    assert inputs["input_ids"][0].tolist() == [367] * left + alone[0].tolist()
    assert inputs["input_ids"][1].tolist() == alone[1].tolist()
    assert inputs["attention_mask"].tolist() == [[False] * left + [True] * len(alone[0]), [True] * len(alone[1])]


def test_rows_of_one_length_need_no_mask(processor):
    assert set(processor(PHOTOS[:2], ["Hi"] * 2)) == {"pixel_values", "input_ids"}


def test_one_prompt_may_have_several_images(processor):
    flat, nested = processor(PHOTOS, "Hi"), processor([PHOTOS], ["Hi"])
    assert flat["pixel_values"].shape[0] == 3
    assert flat["input_ids"].tolist() == nested["input_ids"].tolist()
    assert flat["input_ids"][0].tolist().count(IMAGE_TOKEN) == 3


def test_prompts_of_a_batch_may_have_different_numbers_of_images(processor):
    inputs = processor([PHOTOS[:2], None, PHOTOS[2]], ["Hi"] * 3)
    assert [row.tolist().count(IMAGE_TOKEN) for row in inputs["input_ids"]] == [2, 0, 1]
    assert inputs["pixel_values"].shape[0] == 3


def test_text_alone_has_no_pixel_values(processor):
    assert set(processor(None, "Hi")) == {"input_ids"}
    assert processor(None, ["Hi", "Hi"])["input_ids"].shape[0] == 2


def test_images_of_messages_are_shown(processor):
    first = [{"type": "image", "image": PHOTOS[0]}, {"type": "text", "text": "Hi"}]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(PHOTOS[1])}}, first[1]]},
    ]
    inputs = processor(None, messages, allow=Allow.ALL)
    np.testing.assert_array_equal(inputs["pixel_values"], processor(PHOTOS[:2], "Hi")["pixel_values"])
    assert processor(None, [messages, messages], allow=Allow.ALL)["input_ids"].shape[0] == 2
    with pytest.raises(ImageError, match="files may not be read here"):
        processor(None, messages)


def test_arrays_and_pictures_are_single_images(processor):
    picture = load_image(PHOTOS[0])
    expected = processor(PHOTOS[0], "Hi")["pixel_values"]
    for source in (picture, np.asarray(picture)):
        np.testing.assert_array_equal(processor(source, "Hi")["pixel_values"], expected)


def test_an_image_that_was_shown_before_is_not_decoded_again(processor, monkeypatch):
    data = PHOTOS[0].read_bytes()
    first = processor.prepare_images([data])
    monkeypatch.setattr(processor_module, "load_turned", None)
    np.testing.assert_array_equal(processor.prepare_images([PHOTOS[0]]), first)


@pytest.mark.parametrize("change", ["resolution", "background", "image", "file"])
def test_another_image_or_another_way_to_see_it_is_not_taken_for_one_shown_before(processor, change, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGBA", (20, 10)).save(path)
    first = processor.prepare_images([path])
    options = {"resolution": {"resolution": 64}, "background": {"background": "white"}}.get(change, {})
    if change == "file":
        Image.new("RGB", (20, 10), "red").save(path)
    others = [PHOTOS[0]] if change == "image" else [path]
    assert not np.array_equal(processor.prepare_images(others, **options), first)


def test_an_array_that_has_changed_is_seen_anew(processor):
    pixels = np.zeros((10, 20, 3), np.uint8)
    first = processor.prepare_images([pixels])
    pixels[:] = 200
    assert not np.array_equal(processor.prepare_images([pixels]), first)


def test_a_loaded_image_is_resized_once_and_turned_as_it_is_resized(processor, monkeypatch, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(PHOTOS[0]) as photo:
        photo.convert("RGB").save(tmp_path / "sideways.jpg", exif=exif)
    loaded = load_turned(tmp_path / "sideways.jpg")
    assert loaded.sideways
    first = processor.prepare_images([loaded])
    np.testing.assert_array_equal(first, processor.prepare_images([load_image(tmp_path / "sideways.jpg")]))
    monkeypatch.setattr(images_module, "resize", None)
    np.testing.assert_array_equal(processor.prepare_images([loaded]), first)


def test_a_background_shows_through_every_image(processor):
    image = Image.new("RGBA", (128, 128), (9, 9, 9, 0))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]
    for prompt, images in (("Hi", image), ([{"role": "user", "content": parts}], None)):
        for options, level in (({}, 9), ({"background": "white"}, 255)):
            called = processor(images, prompt, **options)["pixel_values"]
            prepared = processor.prepare(images, prompt, **options).pixel_values
            assert (called == level).all()
            assert (prepared == level).all()
    assert (processor.prepare_images([image], background="white") == 255).all()


def test_resolution_is_the_models_unless_asked(processor):
    assert processor(PHOTOS[0], "Hi")["pixel_values"].shape[1] == 128
    assert processor(PHOTOS[0], "Hi", resolution=192)["pixel_values"].shape[1] == 192


def test_automatic_resolution_suits_the_picture_with_the_finest_details(qwen2):
    rows = np.arange(401)[:, None] // np.array([40, 2])
    plain, fine = (Image.fromarray(np.uint8(np.tile(255 * (row % 2), (300, 1)).T)) for row in rows.T)
    for pictures, expected in (([plain], 256), ([fine], 448), ([plain, fine], 448), ([fine, plain], 448)):
        assert qwen2(pictures, "Hi", resolution="auto:8")["pixel_values"].shape[1] == expected
        assert qwen2.prepare(pictures, "Hi", resolution="auto:8").resolution == expected
        assert qwen2.prepare_images(pictures, "auto:8").shape[1] == expected
        assert qwen2.measure(pictures, "Hi", resolution="auto:8")[1] == len(pictures) * (expected // 64) ** 2
    assert qwen2([fine], "Hi", resolution="auto:3")["pixel_values"].shape[1] == 256
    assert qwen2([plain], "Hi", resolution="auto")["pixel_values"].shape[1] == 448


def test_context_counts_images_by_their_positions(qwen2):
    tokens = len(qwen2.encode("Hi", 1)) - 1
    assert qwen2.context_length == 8192
    qwen2.check_length(qwen2.encode("Hi", 1), 4096 + 64 * 25)  # 89² = 7921
    with pytest.raises(
        PromptError,
        match=rf"takes {90**2 + tokens} positions \(1 image of 8100 and {tokens} tokens\) but the context has 8100; "
        r"lower the resolution \(5696 fits\)$",
    ):
        FastVLMProcessor(qwen2.tokenizer, config(1024, max_length=8100)).check_length(qwen2.encode("Hi", 1), 90 * 64)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(processor):
    prompt = "a" * 9000
    with pytest.raises(PromptError, match=r"but the context has 8192; shorten it$"):
        processor(None, prompt)
    inputs = processor.prepare(None, prompt)
    with pytest.raises(PromptError, match=r"but the context has 8192"):
        _ = inputs.input_ids


@pytest.mark.parametrize("text", ["a", "word ", "🙂", "e\u0301"])
def test_megabytes_of_text_are_refused_without_being_tokenized(processor, monkeypatch, text):
    monkeypatch.setattr(type(processor.tokenizer), "encode", lambda self, text: pytest.fail("tokenized"))
    for prompt in (text * 1_000_000, [{"role": "user", "content": text * 1_000_000}]):
        with pytest.raises(PromptError, match=r"MB of text, which take at least \d+ positions, but the context has 8"):
            processor(None, prompt)


def test_a_long_text_that_fits_is_tokenized(qwen2):
    spaces = qwen2.tokenizer.token_bytes(qwen2.tokenizer.encode(" " * 64)[0])
    assert len(spaces) > 30
    assert qwen2(None, spaces.decode() * 4000 + "x")["input_ids"].shape[1] < 8192


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (PHOTOS, ["Hi", "Hi"], r"3 images for 2 prompts"),
        (
            PHOTOS[0],
            ["Hi", "Hi"],
            r"1 image for 2 prompts; give as many, and a list of images where a prompt has",
        ),
        (None, [], "not an empty one"),
        (None, ["Hi", ""], "the prompt is empty"),
        (None, 3, "must be a string or a list of messages, not int"),
        (None, ["Hi", 3], "must be a string or a list of messages, not int"),
    ],
)
def test_bad_batch_is_refused(processor, images, prompts, message):
    with pytest.raises(PromptError, match=message):
        processor(images, prompts)


def test_bad_image_and_resolution_are_refused(processor):
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such file"):
        processor("nowhere.jpg", "Hi")
    with pytest.raises(ImageError, match="not list"):
        processor([PHOTOS], "Hi")
    with pytest.raises(ImageError, match="not NoneType"):
        processor([None], "Hi")
    with pytest.raises(ConfigError, match=r"not 100; try 64"):
        processor(PHOTOS[0], "Hi", resolution=100)
    with pytest.raises(ConfigError, match="or 'auto', not 'large'"):
        processor(PHOTOS[0], "Hi", resolution="large")


def test_decoding_skips_special_tokens(qwen2):
    ids = [*qwen2.tokenizer.encode("It's a naïve 🙂."), 151_645]
    assert qwen2.decode(ids) == "It's a naïve 🙂."
    assert qwen2.batch_decode([ids, []]) == ["It's a naïve 🙂.", ""]
    detokenizer = qwen2.detokenizer()
    assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == "It's a naïve 🙂."


@pytest.fixture
def folder(processor, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()), encoding="utf-8")
    processor.save(tmp_path)
    return tmp_path


def test_a_saved_processor_is_read_back(processor, folder):
    saved = FastVLMProcessor.from_folder(folder)
    messages = [{"role": "user", "content": "What does the sign say? <image>"}]
    assert saved.encode(messages) == processor.encode(messages)
    assert (saved.image_size, saved.context_length, saved.eos_token_ids) == (128, 8192, (369, 367))


def test_saved_files_hold_what_other_programs_read(folder):
    names = ("tokenizer_config", "preprocessor_config", "processor_config")
    tokenizer, preprocessor, processor = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names
    )
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["pad_token"] == "<|endoftext|>"
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer"
    assert tokenizer["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for values in (preprocessor, processor["image_processor"]):
        assert values["image_mean"] == [0.0] * 3
        assert values["image_std"] == [1.0] * 3
        assert values["size"] == {"shortest_edge": 128}
        assert values["crop_size"] == {"height": 128, "width": 128}
        assert values["do_convert_rgb"] is True
        assert values["resample"] == 3
        assert values["rescale_factor"] == pytest.approx(1 / 255)
    assert preprocessor["processor_class"] == processor["processor_class"] == "FastVLMProcessor"


def test_incomplete_folder_is_refused(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        FastVLMProcessor.from_folder(folder)
    shutil.copy(APPLE / "train" / "tokenizer.json", folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        FastVLMProcessor.from_folder(folder)


def test_importing_the_processor_loads_nothing_heavy():
    code = (
        "import sys, fastvlm_mlx.inputs.processor; "
        "print([name for name in ('mlx', 'torch', 'transformers', 'tokenizers', 'PIL', 'urllib.request') "
        "if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
