"""FastVLM: vision tower, projector and decoder, with the visual tokens spliced into the prompt.

Shapes: B batch, R resolution in pixels, N = (R/64)² visual tokens per image, T token ids (an image is one), L positions
    (an image is N), D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import device, mx, nn
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.engine.decode import Sampler, SamplingConfig, decode
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.model.activations import gelu
from fastvlm_mlx.model.cpu.vision import CPUTower
from fastvlm_mlx.model.language import KVCache, Qwen2
from fastvlm_mlx.model.vision import FastViTHD

TokenIds = npt.ArrayLike | mx.array


class GELU(nn.Module):
    """The exact GELU."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


class MultimodalProjector(list[nn.Module]):
    """LLaVA's `mlp2x_gelu`: features (B, N, C) -> visual tokens (B, N, D). A list, for the names `0` and `2`."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__([nn.Linear(features, hidden_size), GELU(), nn.Linear(hidden_size, hidden_size)])

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self:
            x = layer(x)
        return x


class FastVLM(nn.Module):
    """The whole model.

    Attributes:
        prefixes: What earlier prompts left behind for `stream_generate`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.vision_config)
        self.mm_projector = MultimodalProjector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Qwen2(config.text_config)
        self.prefixes = PrefixCache()
        self._arranged: Callable[[mx.array], mx.array] | None = None

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: str | None = None, revision: str | None = None) -> "FastVLM":
        """The model of a Hub id, alias, source folder or converted folder; see `fastvlm_mlx.load`."""
        from fastvlm_mlx.checkpoint.load import load_model, resolve

        return load_model(resolve(name, revision=revision), dtype=dtype)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that activations are computed in."""
        dtype: mx.Dtype = self.language_model.model.norm.weight.dtype
        return dtype

    def encode_image(
        self, pixel_values: npt.ArrayLike | mx.array, meanwhile: Callable[[], None] | None = None
    ) -> mx.array:
        """Visual tokens (B, N, D) of pixel values (B, R, R, 3), float in [0, 1] or uint8.

        A CPU evaluates the tower here, and calls `meanwhile` when all is ready for that, so that a thread which is
        started there has Python for itself.

        Raises:
            ConfigError: If the shape is another, or a side is not a multiple of 64.
            RuntimeError: After `free_vision_tower`.
        """
        pixels = pixel_values if isinstance(pixel_values, mx.array) else mx.array(np.asarray(pixel_values))
        if (
            pixels.ndim != 4
            or pixels.shape[-1] != 3
            or pixels.shape[1] % 64
            or pixels.shape[2] % 64
            or 0 in pixels.shape
        ):
            raise ConfigError(f"pixel_values must be (B, R, R, 3) with R a multiple of 64, not {pixels.shape}")
        if pixels.dtype == mx.uint8:
            pixels = pixels.astype(mx.float32) / 255
        tower, pixels = self._tower, pixels.astype(self.dtype)
        features = tower(pixels, meanwhile) if isinstance(tower, CPUTower) else tower(pixels)
        return self.mm_projector(features.reshape(features.shape[0], -1, features.shape[-1]))

    @property
    def _tower(self) -> Callable[[mx.array], mx.array]:
        """The tower in the form that suits the device: compiled on a GPU, rearranged on a CPU; made on first use."""
        if "stem" not in self.vision_tower:
            raise RuntimeError("the vision tower was freed; load the model again to show it another image")
        if self._arranged is None:
            # Before compiling, or every call would read the weights again.
            mx.eval(self.vision_tower.parameters())
            if device() == "gpu":
                self._arranged = mx.compile(self.vision_tower)
            else:
                self._arranged = CPUTower(self.vision_tower) if self.dtype == mx.float32 else self.vision_tower
        return self._arranged

    def free_vision_tower(self) -> None:
        """Gives the tower's memory back, when the last image has been encoded."""
        self._arranged = None
        self.vision_tower.clear()

    def embed(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
    ) -> mx.array:
        """Input embeddings (B, L, D), each image's visual tokens in the place of its `IMAGE_TOKEN`.

        Rows that come out shorter than the longest are padded with zeros on their left.

        Args:
            input_ids: (B, T) token ids, or (T,) for one row.
            pixel_values: (images, R, R, 3), in the order of their places in `input_ids`, row by row.
            attention_mask: (B, T), False where `input_ids` is padding.

        Raises:
            PromptError: If the images and their places differ in number.
        """
        return self._embed(_rows(input_ids, attention_mask), pixel_values)[0]

    def _embed(
        self,
        rows: list[npt.NDArray[np.int32]],
        pixel_values: npt.ArrayLike | mx.array | None,
        visual_tokens: mx.array | None = None,
        *,
        last_images: bool = False,
    ) -> tuple[mx.array, list[int]]:
        """Embeddings (B, L, D) of rows of token ids, and how many positions of each row are padding."""
        given = pixel_values if visual_tokens is None else visual_tokens
        images = 0 if given is None else len(given)  # type: ignore[arg-type]
        places = sum(int((row == IMAGE_TOKEN).sum()) for row in rows)
        if images != places:
            raise PromptError(f"the prompt has {places} place(s) for an image but {images} image(s) were given")
        if visual_tokens is None and pixel_values is not None:
            visual_tokens = self.encode_image(pixel_values)
        visual = iter(visual_tokens if visual_tokens is not None else ())
        if last_images and device() == "cpu":
            # A GPU runs one graph without a stop, and its memory is not what counts.
            self.free_vision_tower()
        embedded = []
        for row in rows:
            bounds = np.flatnonzero(row == IMAGE_TOKEN)
            parts = []
            for number, text in enumerate(np.split(row, bounds)):
                if number:
                    parts.append(next(visual))
                    text = text[1:]
                if len(text):
                    parts.append(self.language_model.model.embed_tokens(mx.array(text)))
            embedded.append(mx.concatenate(parts) if len(parts) > 1 else parts[0])
        length = max(len(row) for row in embedded)
        padding = [length - len(row) for row in embedded]
        return mx.stack(
            [mx.pad(row, [(left, 0), (0, 0)]) for row, left in zip(embedded, padding, strict=True)]
        ), padding

    def prefill(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
        cache: list[KVCache] | None = None,
        *,
        visual_tokens: mx.array | None = None,
        last_images: bool = False,
    ) -> tuple[mx.array, list[KVCache]]:
        """Logits (B, V) of the last position and the filled cache: pixels to logits as one graph, not yet evaluated.

        Args:
            input_ids: As in `embed`, without the tokens that `cache` holds already.
            pixel_values: As in `embed`.
            attention_mask: As in `embed`.
            cache: What came before, for one row; by default nothing.
            visual_tokens: (images, N, D) from `encode_image`, where that has been called already.
            last_images: Whether no other images will follow: a CPU then frees the vision tower before the decoder runs.
        """
        rows = _rows(input_ids, attention_mask)
        embeddings, padding = self._embed(rows, pixel_values, visual_tokens, last_images=last_images)
        if cache is None:
            cache = self.language_model.make_cache(mx.array(padding) if any(padding) else None)
        return self.language_model.prefill(embeddings, cache), cache

    def generate(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
        *,
        max_tokens: int = 256,
        **sampling: Any,
    ) -> list[list[int]]:
        """The new token ids of each row, without the end token; `sampling` are the arguments of `SamplingConfig`."""
        rows = _rows(input_ids, attention_mask)
        logits, cache = self.prefill(input_ids, pixel_values, attention_mask)
        sampler = Sampler(SamplingConfig(**sampling), [row[row >= 0].tolist() for row in rows])
        answers: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        for tokens in decode(self.language_model, logits, cache, sampler, max_tokens):
            for index, token in enumerate(np.asarray(tokens).tolist()):
                if index in open_rows and token in self.config.eos_token_id:
                    open_rows.discard(index)
                elif index in open_rows:
                    answers[index].append(token)
            if not open_rows:
                break
        return answers


def _rows(input_ids: TokenIds, attention_mask: npt.ArrayLike | mx.array | None) -> list[npt.NDArray[np.int32]]:
    """The token ids of each row without its padding."""
    ids = np.atleast_2d(np.asarray(input_ids, dtype=np.int32))
    if attention_mask is None:
        rows = list(ids)
    else:
        rows = [
            row[kept] for row, kept in zip(ids, np.atleast_2d(np.asarray(attention_mask)).astype(bool), strict=True)
        ]
    if any(len(row) == 0 for row in rows):
        raise PromptError("input_ids has a row without tokens")
    return rows
