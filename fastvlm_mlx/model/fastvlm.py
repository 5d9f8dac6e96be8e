"""FastVLM: vision tower, projector and decoder, with the visual tokens spliced into the prompt.

Shapes: B batch, R resolution in pixels, N = (R/64)² visual tokens per image, T token ids (an image is one), L positions
    (an image is N), C channels of the tower, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.arguments import StrPath, check_callable, check_kind, flag
from fastvlm_mlx.backend import device, mx, nn
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.model.activations import gelu
from fastvlm_mlx.model.inputs import check_cache, check_pixels, float_array, token_rows
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.language import Qwen2, linear
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.streams import turn

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvlm_mlx.engine.options import GenerationConfig, GenerationOptions

TokenIds = npt.ArrayLike | mx.array

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _in_turn(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets any thread call `method`: evaluates its results, unless the caller holds a turn and goes on with them."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with turn() as outermost:
            result = method(*args, **kwargs)
            if outermost:
                _evaluate(result)
            return result

    return call


def _evaluate(result: Any) -> None:
    if isinstance(result, tuple):
        logits, cache = result
        mx.eval(logits, [layer.state for layer in cache])
    else:
        mx.eval(result)


class GELU(nn.Module):
    """The exact GELU."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


class MultimodalProjector(list[nn.Module]):
    """LLaVA's `mlp2x_gelu`: features (B, N, C) -> visual tokens (B, N, D). A list, for upstream's names `0` and `2`."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__([nn.Linear(features, hidden_size), GELU(), nn.Linear(hidden_size, hidden_size)])

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self:
            x = linear(layer, x)
        return x


class FastVLM(nn.Module):
    """The whole model: arrays and functions, without a state of its own.

    Any thread may call its methods. A method that returns arrays evaluates them, except within a
    `fastvlm_mlx.streams.turn()`, where they stay part of a larger graph.

    Attributes:
        config: The architecture.
        tower: How the vision tower runs on this device, from `prepare`; None runs its modules as they are.
        group: The processes that share the decoder; None if this one has all of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        check_kind(config, "config", ModelConfig, "a ModelConfig")
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.vision_config)
        self.mm_projector = MultimodalProjector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Qwen2(config.text_config)
        self.tower: Callable[..., mx.array] | None = None
        self.group: mx.distributed.Group | None = None

    @classmethod
    def from_pretrained(
        cls, name: StrPath, *, dtype: str | mx.Dtype | None = None, revision: str | None = None
    ) -> FastVLM:
        """The model of a Hub id, alias, source folder or converted folder; see `fastvlm_mlx.load`."""
        from fastvlm_mlx.checkpoint.load import load_model
        from fastvlm_mlx.resolve import resolve

        return load_model(resolve(name, revision=revision), dtype=dtype)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Reads all weights, so that `pickle` and `copy` find them; a copy arranges its tower for its own device."""
        with turn():
            self.language_model.first_pass = None
            mx.eval(self.parameters())
        return super().__reduce_ex__(protocol)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that activations are computed in."""
        dtype: mx.Dtype = self.language_model.model.norm.weight.dtype
        return dtype

    @_in_turn
    def vision_features(
        self, pixel_values: npt.ArrayLike | mx.array, on_submit: Callable[[], None] | None = None
    ) -> mx.array:
        """Features (B, R/64, R/64, C) of pixel values (B, R, R, 3), floats in [0, 1] or uint8.

        A CPU evaluates the tower here, and calls `on_submit` once its work is queued: a thread started there can use
        the GIL while MLX computes.

        Raises:
            ConfigError: If the shape, the type or the range is another, a side is not a multiple of 64, or the tower
                was freed.
        """
        check_callable(on_submit, "on_submit")
        pixels = check_pixels(pixel_values)
        if "stem" not in self.vision_tower:
            raise ConfigError("the vision tower was freed; load the model again to show it another image")
        if pixels.dtype == mx.uint8:
            pixels = pixels.astype(mx.float32) / 255
        pixels = pixels.astype(self.dtype)
        return self.vision_tower(pixels) if self.tower is None else self.tower(pixels, on_submit)

    @_in_turn
    def project(self, features: npt.ArrayLike | mx.array) -> mx.array:
        """Visual tokens (B, N, D) of the tower's features (B, R/64, R/64, C).

        Raises:
            ConfigError: If these are no such features.
        """
        features = float_array(features, "features", ("B", "R/64", "R/64", self.config.vision_config.hidden_size))
        return self.mm_projector(features.reshape(features.shape[0], -1, features.shape[-1]))

    @_in_turn
    def encode_image(
        self, pixel_values: npt.ArrayLike | mx.array, on_submit: Callable[[], None] | None = None
    ) -> mx.array:
        """Visual tokens (B, N, D) of pixel values; arguments and errors are those of `vision_features`."""
        return self.project(self.vision_features(pixel_values, on_submit))

    def free_vision_tower(self) -> None:
        """Releases the tower's memory, when the last image has been encoded."""
        with turn():
            self.tower = None
            self.vision_tower.clear()

    @_in_turn
    def embed(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
        *,
        visual_tokens: npt.ArrayLike | mx.array | None = None,
    ) -> mx.array:
        """Input embeddings (B, L, D), each image's visual tokens in the place of its `IMAGE_TOKEN`.

        Rows that come out shorter than the longest are padded with zeros on their left.

        Args:
            input_ids: (B, T) token ids, or (T,) for one row.
            pixel_values: (images, R, R, 3), in the order of their places in `input_ids`, row by row.
            attention_mask: (B, T), False where `input_ids` is padding.
            visual_tokens: (images, N, D) from `encode_image`, where that has been called already.

        Raises:
            PromptError: If a token id is outside the vocabulary, or the images and their places differ in number.
            ConfigError: If another argument is of the wrong kind or shape.
        """
        return self._embed(self.rows(input_ids, attention_mask), pixel_values, visual_tokens)[0]

    def _embed(
        self,
        rows: Sequence[npt.NDArray[np.int32]],
        pixel_values: npt.ArrayLike | mx.array | None,
        visual_tokens: npt.ArrayLike | mx.array | None,
        *,
        free_tower: bool = False,
    ) -> tuple[mx.array, list[int]]:
        """Embeddings (B, L, D) of rows of token ids, and how many positions of each row are padding."""
        tokens: mx.array | None = None
        if visual_tokens is not None:
            tokens = float_array(visual_tokens, "visual_tokens", ("images", "N", self.config.text_config.hidden_size))
        elif pixel_values is not None:
            pixel_values = check_pixels(pixel_values)
        given = tokens if tokens is not None else pixel_values
        images = 0 if given is None else len(given)  # type: ignore[arg-type]
        places = sum(int((row == IMAGE_TOKEN).sum()) for row in rows)
        if images != places:
            raise PromptError(f"images given: {images}, places for them in the prompt: {places}; they must agree")
        if tokens is None and pixel_values is not None:
            tokens = self.encode_image(pixel_values)
        visual = iter(tokens if tokens is not None else ())
        if free_tower and device() == "cpu":
            # On a GPU the tower is part of one graph, so nothing could be freed yet.
            self.free_vision_tower()
        embedded = []
        for row in rows:
            parts = []
            for number, text in enumerate(np.split(row, np.flatnonzero(row == IMAGE_TOKEN))):
                if number:
                    parts.append(next(visual))
                    text = text[1:]
                if len(text):
                    parts.append(self.language_model.embed(text))
            embedded.append(mx.concatenate(parts) if len(parts) > 1 else parts[0])
        length = max(len(row) for row in embedded)
        padding = [length - len(row) for row in embedded]
        return mx.stack(
            [mx.pad(row, [(left, 0), (0, 0)]) for row, left in zip(embedded, padding, strict=True)]
        ), padding

    @_in_turn
    def prefill(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
        cache: list[KVCache] | None = None,
        *,
        visual_tokens: npt.ArrayLike | mx.array | None = None,
        free_tower: bool = False,
    ) -> tuple[mx.array, list[KVCache]]:
        """Logits (B, V) of the last position and the filled cache: from pixels to logits as one graph.

        Args:
            input_ids: As in `embed`, without the tokens that `cache` holds already.
            pixel_values: As in `embed`.
            attention_mask: As in `embed`.
            cache: What came before, for one row; by default nothing.
            visual_tokens: As in `embed`.
            free_tower: Whether no other images will follow: a CPU then frees the vision tower before the decoder runs.

        Raises:
            PromptError: If a token id is outside the vocabulary, or the images and their places differ in number.
            ConfigError: If another argument is of the wrong kind or shape.
        """
        if cache is not None:
            check_cache(cache, len(self.language_model.layers))
        free_tower = flag(free_tower, "free_tower")
        rows = self.rows(input_ids, attention_mask)
        embeddings, padding = self._embed(rows, pixel_values, visual_tokens, free_tower=free_tower)
        if cache is None:
            cache = self.language_model.make_cache(padding if any(padding) else None)
        return self.language_model.prefill(embeddings, cache), cache

    def generate(
        self,
        input_ids: TokenIds,
        pixel_values: npt.ArrayLike | mx.array | None = None,
        attention_mask: npt.ArrayLike | mx.array | None = None,
        *,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[list[int]]:
        """The new token ids of each row, without the end token; see `fastvlm_mlx.engine.batch.generate_rows`.

        Args:
            input_ids: As in `embed`.
            pixel_values: As in `embed`.
            attention_mask: As in `embed`.
            config: How to choose tokens: for all rows, or one for each.
            options: Fields of `GenerationConfig` that differ from `config`, such as `max_tokens=64`.
        """
        from fastvlm_mlx.engine.batch import generate_rows

        return generate_rows(self, input_ids, pixel_values, attention_mask, config=config, **options)

    def rows(
        self, input_ids: TokenIds, attention_mask: npt.ArrayLike | mx.array | None = None
    ) -> list[npt.NDArray[np.int32]]:
        """The token ids of each row without its padding.

        Raises:
            PromptError: If these are no token ids, a row has none, or one is neither in the vocabulary nor
                `IMAGE_TOKEN`.
        """
        return token_rows(input_ids, attention_mask, self.config.text_config.vocab_size)
