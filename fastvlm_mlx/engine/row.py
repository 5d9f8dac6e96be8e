"""One prompt and its answer, as a row of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.constraint import Constraint
from fastvlm_mlx.engine.logprobs import TokenLogprob
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixKey, prefix_key
from fastvlm_mlx.engine.sampling import Sampler


class Row:
    """A prompt, how to answer it, and the answer so far.

    Args:
        input_ids: (T,) of the prompt, an image's as `IMAGE_TOKEN`.
        pixel_values: (images, R, R, 3), uint8; zero images for a prompt without any.
        config: How to choose tokens.
        max_tokens: The most tokens of the answer; at least 1.
        end_tokens: The ids that end it.
        constrain: Makes what the answer has to follow, at its beginning; None for nothing.
        keep_visual_tokens: Whether to keep the visual tokens of its images, if the vision tower sees these for it.

    Attributes:
        tokens: The ids generated so far, an end token included.
        logprobs: Of each of them, if the config asks for it.
        reused: Tokens of the prompt whose keys and values came from the prefix cache.
        complete: Whether the answer fulfils its constraint, and nothing may follow.
        cancelled: Set this to end the row at the next step.
        error: Why it failed; None if it did not.
        joined: When it began to be computed, a time of `time.perf_counter`.
        visual_tokens: (images, N, D), float32, with the first token; None if not kept, or if an earlier prompt spared
            the tower an image.
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        pixel_values: NDArray[np.uint8],
        config: GenerationConfig,
        *,
        max_tokens: int,
        end_tokens: Sequence[int] = (),
        constrain: Callable[[], Constraint] | None = None,
        keep_visual_tokens: bool = False,
    ) -> None:
        self.input_ids = list(input_ids)
        self.pixel_values = pixel_values
        seed = config.seed if config.seed is not None else int(np.random.default_rng().integers(2**63))
        self.config = replace(config, seed=seed)
        self.max_tokens = max_tokens
        self.end_tokens = frozenset(end_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reused = 0
        self.complete = False
        self.cancelled = False
        self._constrain = constrain
        self.error: Exception | None = None
        self.joined = 0.0
        self.keep_visual_tokens = keep_visual_tokens
        self.visual_tokens: mx.array | None = None

    @property
    def ended(self) -> bool:
        """Whether no token follows."""
        if self.cancelled or self.complete or self.error is not None or len(self.tokens) >= self.max_tokens:
            return True
        return bool(self.tokens) and self.tokens[-1] in self.end_tokens

    @property
    def resolution(self) -> int:
        """R, the side of its images in pixels."""
        return int(self.pixel_values.shape[1])

    @cached_property
    def key(self) -> PrefixKey:
        """The prompt's token ids, with each image known by its content."""
        return prefix_key(self.input_ids, self.pixel_values)

    @property
    def image_keys(self) -> list[bytes]:
        """The content of each image, hashed."""
        return [token for token in self.key if isinstance(token, bytes)]

    @property
    def history(self) -> PrefixKey:
        """The key of the prompt and the tokens after it: what the next token follows."""
        return (*self.key, *self.tokens)

    @property
    def picture(self) -> PrefixKey:
        """The key up to the last image; empty without images."""
        images = [place for place, token in enumerate(self.key) if isinstance(token, bytes)]
        return self.key[: images[-1] + 1] if images else ()

    def sampler(self) -> Sampler:
        """A sampler that chooses the next token, after those that are there."""
        constraint = None if self._constrain is None else self._constrain()
        sampler = Sampler(self.config, [token for token in self.input_ids if token != IMAGE_TOKEN], constraint)
        sampler.skip(self.tokens)
        return sampler
