"""Turns images and conversations into model inputs, and token ids into text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from fastvlm_mlx.arguments import StrPath, check_kind, checked_ids, elements, file_path, valid_text, whole
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.formatting import counted, readable_bytes
from fastvlm_mlx.inputs.images import choose_resolution, load_turned, open_source, preprocess
from fastvlm_mlx.inputs.prompts import CHAT_TEMPLATE, ImageReference, Mark, Prompt, Turn, conversation, render
from fastvlm_mlx.inputs.recent import Recent
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.inputs.sources import Allow, Encoded, ImageSource
from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer, Tokenizer
from fastvlm_mlx.inputs.tokenizer_files import END_OF_TEXT, IM_END, IM_START

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from fastvlm_mlx.inputs.turned import TurnedImage


_LONG = 8
"""Characters for each position of the context from which on a text is suspected to be too long."""


_KEPT, _KEPT_BYTES = 4, 32_000_000
"""How many questions' images are kept as the model sees them, and the most encoded bytes of those of one question."""


class _TokenIds(TypedDict):
    input_ids: NDArray[np.int32]


class ModelInputs(_TokenIds, total=False):
    """What `FastVLM.generate` and `FastVLM.embed` take as keywords; see `FastVLMProcessor.__call__`."""

    pixel_values: NDArray[np.uint8]
    attention_mask: NDArray[np.bool_]


class FastVLMProcessor:
    """Turns images and conversations into model inputs, and token ids into text.

    Args:
        tokenizer: Of the checkpoint.
        config: Of the checkpoint; gives the native resolution, the context length, the vocabulary and the end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        check_kind(tokenizer, "tokenizer", Tokenizer, "a Tokenizer")
        check_kind(config, "config", ModelConfig, "a ModelConfig")
        self.tokenizer = tokenizer
        self.image_size = config.vision_config.image_size
        self.patch_size = config.vision_config.patch_size
        self.context_length = config.context_length
        self.vocab_size = config.text_config.vocab_size
        self.eos_token_ids = config.eos_token_id
        self._recent: Recent[object, NDArray[np.uint8]] = Recent(_KEPT)

    @classmethod
    def from_pretrained(cls, name: StrPath, *, revision: str | None = None) -> FastVLMProcessor:
        """The processor of a Hub id, alias, source folder or converted folder; see `fastvlm_mlx.load`."""
        from fastvlm_mlx.resolve import resolve

        return cls.from_folder(resolve(name, revision=revision))

    @classmethod
    def from_folder(cls, folder: StrPath) -> FastVLMProcessor:
        """The processor of a converted folder.

        Raises:
            CheckpointError: If a file is missing or damaged.
            ConfigError: If it is not a converted checkpoint.
        """
        config = ModelConfig.from_path(file_path(folder, "folder"))
        return cls(Tokenizer(folder, config.text_config.vocab_size), config)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None,
        prompts: Prompt | Sequence[Prompt],
        *,
        resolution: Resolution = None,
        system: str | None = None,
        background: str | None = None,
        allow: Allow | None = None,
    ) -> ModelInputs:
        """The arrays that `FastVLM.generate` and `FastVLM.embed` take as keywords.

        `input_ids` (B, T), int32, with `IMAGE_TOKEN` in the place of each image; `pixel_values` (images, R, R, 3),
        uint8, row by row, absent without images; `attention_mask` (B, T), False where a row is padded on its left,
        absent if no row is.

        Args:
            images: For one prompt, an image or several. For a list of prompts, a list of the same length whose entries
                are each an image, a list of images or None.
            prompts: A prompt (a string, or messages), or a list of prompts.
            resolution: In pixels, the same for all images.
            system: Replaces the default system text.
            background: Colour under transparent pixels; see `load_image`.
            allow: What images may refer to; see `conversation` for the default.

        Raises:
            ImageError: If an image is not allowed or cannot be read.
            PromptError: If a prompt is empty, malformed or too long, or the numbers of images and prompts differ.
            ConfigError: If the model cannot run at `resolution`.
        """
        conversations = [
            conversation(prompt, sources, system, allow=allow) for prompt, sources in _pairs(images, prompts)
        ]
        references = [image for turns in conversations for image in _images(turns)]
        pixel_values = self._preprocess(references, resolution, background)
        rows = [self.encode_turns(turns) for turns in conversations]
        for row in rows:
            self.check_length(row, pixel_values.shape[1])
        length = max(map(len, rows))
        uneven = any(len(row) < length for row in rows)
        pad = [self.tokenizer.token_id(END_OF_TEXT)] if uneven else []
        inputs = ModelInputs(
            input_ids=np.array([pad * (length - len(row)) + row for row in rows], dtype=np.int32),
        )
        if len(pixel_values):
            inputs["pixel_values"] = pixel_values
        if uneven:
            inputs["attention_mask"] = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
        return inputs

    def prepare(
        self,
        images: ImageSource | Sequence[ImageSource] | None,
        prompt: Prompt,
        *,
        resolution: Resolution = None,
        system: str | None = None,
        background: str | None = None,
        allow: Allow | None = None,
        prefix: str = "",
    ) -> Inputs:
        """The inputs of one prompt, without waiting for the tokenizer.

        Arguments and errors are those of a call with one prompt, but for `prefix`, which the answer continues. A prompt
        that is too long is noticed when its `input_ids` are used.
        """
        prefix = str(valid_text(prefix, "the prefix")).rstrip(" ")  # a word brings the space before it
        turns = conversation(prompt, _as_list(images), system, allow=allow)
        pixel_values = self._preprocess(_images(turns), resolution, background)
        return Inputs(processor=self, turns=turns, pixel_values=pixel_values, prefix=prefix)

    def measure(
        self,
        images: Sequence[Image | TurnedImage],
        prompt: Prompt,
        *,
        resolution: Resolution = None,
        system: str | None = None,
    ) -> tuple[int, int]:
        """The positions that a prompt takes, and how many of them are visual, without preparing its images.

        Raises:
            PromptError: If the prompt is empty or malformed, or its text far too long.
            ConfigError: If the model cannot run at `resolution`.
        """
        input_ids = self.encode_turns(conversation(prompt, [b""] * len(images), system))
        side = choose_resolution(images, resolution, self.image_size)
        return self.positions(input_ids, side), input_ids.count(IMAGE_TOKEN) * self.num_visual_tokens(side)

    def prepare_images(
        self,
        images: Sequence[ImageSource],
        resolution: Resolution = None,
        *,
        background: str | None = None,
        allow: Allow = Allow.ALL,
    ) -> NDArray[np.uint8]:
        """Pixel values (images, R, R, 3).

        Raises:
            ImageError: If an image is not allowed or cannot be read.
            ConfigError: If the model cannot run at `resolution`.
        """
        check_kind(allow, "allow", Allow, "an Allow")
        references = [ImageReference(source=image, allow=allow) for image in _as_list(images)]
        return self._preprocess(references, resolution, background)

    def _preprocess(
        self, references: Sequence[ImageReference], resolution: Resolution, background: str | None
    ) -> NDArray[np.uint8]:
        opened = [open_source(image.source, allow=image.allow) for image in references]
        data = tuple(source.data for source in opened if isinstance(source, Encoded))

        def make() -> NDArray[np.uint8]:
            pictures = [load_turned(source, background=background) for source in opened]
            side = choose_resolution(pictures, resolution, self.image_size)
            if not pictures:
                return np.zeros((0, side, side, 3), dtype=np.uint8)
            return np.stack([preprocess(picture, side) for picture in pictures])

        if not data or len(data) < len(opened) or sum(map(len, data)) > _KEPT_BYTES:
            return make()
        return self._recent.get((data, resolution, background), make)

    def encode(self, prompt: Prompt, n_images: int = 0, system: str | None = None) -> list[int]:
        """Token ids of a prompt with `n_images` images, each one `IMAGE_TOKEN`.

        Raises:
            PromptError: If the prompt is empty or malformed.
            ConfigError: If `n_images` is no whole number.
        """
        return self.encode_turns(
            conversation(prompt, [b""] * whole(n_images, "n_images", 0, self.context_length), system)
        )

    def encode_turns(self, turns: Sequence[Turn], prefix: str = "") -> list[int]:
        """Token ids of a conversation, and of the beginning of its answer.

        The latter is encoded alone, so that a text means the same tokens before every answer.

        Raises:
            PromptError: If these are no turns, or their text is far too long.
        """
        if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Turn) for turn in turns):
            raise PromptError(f"turns must be a list of Turn, as `conversation` makes them, not {type(turns).__name__}")
        self._check_size("".join((*(turn.text for turn in turns), prefix)))
        marks = {
            Mark.IM_START: self.tokenizer.token_id(IM_START),
            Mark.IM_END: self.tokenizer.token_id(IM_END),
            Mark.IMAGE: IMAGE_TOKEN,
        }
        ids: list[int] = []
        for piece in render(turns):
            ids += [marks[piece]] if isinstance(piece, Mark) else self.tokenizer.encode(piece)
        return ids + self.tokenizer.encode(prefix) if prefix else ids

    def _check_size(self, text: str) -> None:
        """Refuses a text that cannot fit, since tokenizing ten megabytes takes a minute."""
        if len(text) <= _LONG * self.context_length:
            return
        size = len(unicodedata.normalize("NFC", text).encode())  # as the tokenizer composes it
        least = size // self.tokenizer.longest
        if least >= self.context_length:
            raise PromptError(
                f"the prompt has {readable_bytes(size)} of text, which take at least {least} positions, but the "
                f"context has {self.context_length}; shorten it"
            )

    def num_visual_tokens(self, resolution: int) -> int:
        """N, the number of positions that an image takes."""
        return (whole(resolution, "resolution", 0) // self.patch_size) ** 2

    def positions(self, input_ids: Sequence[int], resolution: int) -> int:
        """L, the number of positions that a prompt takes.

        Raises:
            PromptError: If these are no token ids.
        """
        ids = checked_ids(input_ids, self.vocab_size, IMAGE_TOKEN)
        return len(ids) + ids.count(IMAGE_TOKEN) * (self.num_visual_tokens(resolution) - 1)

    def check_length(self, input_ids: Sequence[int], resolution: int) -> None:
        """Checks that a prompt leaves room for an answer.

        Raises:
            PromptError: If it does not.
        """
        positions, visual = self.positions(input_ids, resolution), self.num_visual_tokens(resolution)
        if positions >= self.context_length:
            images = list(input_ids).count(IMAGE_TOKEN)
            text = len(input_ids) - images
            smaller = range(self.patch_size, resolution, self.patch_size)
            fitting = [side for side in smaller if images and self.positions(input_ids, side) < self.context_length]
            advice = f"lower the resolution ({fitting[-1]} fits)" if fitting else "shorten it"
            if images > 1:
                advice += ", or show fewer images"
            raise PromptError(
                f"the prompt takes {positions} positions ({counted(images, 'image')} of {visual} and "
                f"{counted(text, 'token')}) but the context has {self.context_length}; {advice}"
            )

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of an answer; special tokens, and the places of images in a prompt, are skipped.

        Raises:
            PromptError: If these are no ids of the vocabulary.
        """
        ids = checked_ids(token_ids, self.vocab_size, IMAGE_TOKEN)
        return self.tokenizer.decode([token for token in ids if token != IMAGE_TOKEN])

    def batch_decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """The text of each answer.

        Raises:
            PromptError: If one of them holds no ids of the vocabulary.
        """
        found = elements(rows)
        if found is None:
            raise PromptError(f"token ids of a batch must be rows of whole numbers, not {type(rows).__name__}")
        return [self.decode(row) for row in found]

    def detokenizer(self) -> StreamingDetokenizer:
        """A new detokenizer for one streamed answer."""
        return StreamingDetokenizer(self.tokenizer)

    def save(self, folder: StrPath) -> None:
        """Writes the tokenizer and processor files that this project, transformers and mlx-vlm read."""
        folder = file_path(folder, "folder")
        self.tokenizer.save(folder)
        size = {"height": self.image_size, "width": self.image_size}
        image_processor = {
            "image_processor_type": "CLIPImageProcessor",  # the nearest that transformers knows; it crops
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "image_aspect_ratio": "pad",
        }
        processor = {"processor_class": type(self).__name__}
        tokenizer = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "bos_token": None,
            "unk_token": None,
            "additional_special_tokens": [IM_START, IM_END],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": self.context_length,
            "padding_side": "left",
            "split_special_tokens": False,
            "chat_template": CHAT_TEMPLATE,
            **processor,
        }
        for name, values in {
            "tokenizer_config": tokenizer,
            "preprocessor_config": {**image_processor, **processor},
            "processor_config": {"image_processor": image_processor, **processor},
        }.items():
            text = json.dumps(values, indent=2, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The inputs of one prompt: pixel values at once, token ids when they are first used.

    A tokenizer without tables takes half a second, so the vision tower is started before `input_ids` are used:

    >>> inputs = processor.prepare("photo.jpg", "Describe the image.")
    >>> visual_tokens = model.encode_image(inputs.pixel_values)
    >>> mx.async_eval(visual_tokens)
    >>> inputs.start()
    >>> inputs.input_ids

    Attributes:
        processor: Made them.
        turns: The conversation.
        pixel_values: (images, R, R, 3), uint8; without images, there are 0.
        prefix: What the answer begins with.
    """

    processor: FastVLMProcessor
    turns: tuple[Turn, ...]
    pixel_values: NDArray[np.uint8]
    prefix: str = ""

    @property
    def resolution(self) -> int:
        """R, the side of each image in pixels."""
        return int(self.pixel_values.shape[1])

    def start(self) -> None:
        """Starts to build the tokenizer in the background."""
        self.processor.tokenizer.start()

    @cached_property
    def input_ids(self) -> list[int]:
        """T token ids, with `IMAGE_TOKEN` in the place of each image.

        Raises:
            PromptError: If the prompt is too long.
            CheckpointError: If the tokenizer is damaged.
        """
        ids = self.processor.encode_turns(self.turns, self.prefix)
        self.processor.check_length(ids, self.resolution)
        return ids


def _images(turns: Sequence[Turn]) -> list[ImageReference]:
    return [image for turn in turns for image in turn.images if image is not None]


def _pairs(images: Any, prompts: Any) -> list[tuple[Prompt, Sequence[ImageSource]]]:
    """Each prompt with its images."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) or _is_messages(prompts):
        return [(prompts, _as_list(images))]
    entries = [None] * len(prompts) if images is None else _as_list(images)
    if len(entries) != len(prompts):
        raise PromptError(
            f"{counted(len(entries), 'image')} for {counted(len(prompts), 'prompt')}; give as many, and a list of "
            "images where a prompt has several"
        )
    return [(prompt, _as_list(entry)) for prompt, entry in zip(prompts, entries, strict=True)]


def _is_messages(prompts: Sequence[Any]) -> bool:
    return not prompts or isinstance(prompts[0], Mapping)


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
