import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import fastvlm_mlx
from fastvlm_mlx import generate
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.measure import PHASES, measure, time_cold, time_generate, time_phases
from fastvlm_mlx.bench.random_model import random_model
from fastvlm_mlx.bench.report import Tokens
from fastvlm_mlx.config import ActivationScales, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import CheckpointError
from tests.checkpoints import APPLE

PROMPT = "Describe the image."


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    """A tiny model with random weights."""
    depths = (1, 1, 1, 1, 1)
    config = ModelConfig(
        vision_config=VisionConfig(
            embed_dims=(16, 32, 64, 128, 256), depths=depths, image_size=64, scales=ActivationScales.ones(depths)
        ),
        text_config=TextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=151936,
        ),
        dtype="float32",
        eos_token_id=(151645,),
    )
    model, processor = random_model(config)
    return Candidate(name="tiny", model=model, processor=processor)


@pytest.fixture(scope="module")
def image() -> bytes:
    return Images()(0)


def test_every_phase_is_timed_in_order(candidate: Candidate, image: bytes) -> None:
    phases = time_phases(candidate.model, candidate.processor, image, PROMPT, 64)
    assert ["load", *phases] == list(PHASES)
    assert min(phases.values()) > 0


def test_the_benchmark_measures_the_public_function() -> None:
    """`fastvlm generate` calls the public name, as tests/cli/test_generate.py shows; the benchmark the same object."""
    assert sys.modules[time_generate.__module__].stream_generate is fastvlm_mlx.stream_generate  # type: ignore[attr-defined]


def test_an_answer_has_the_requested_length_whatever_the_end_tokens(candidate: Candidate, image: bytes) -> None:
    model, processor = candidate.model, copy.copy(candidate.processor)
    question = {"image": image, "prompt": PROMPT, "resolution": 64}
    processor.eos_token_ids = generate(model, processor, **question, max_tokens=5).token_ids  # type: ignore[arg-type]
    assert generate(model, processor, **question, max_tokens=5).generated_tokens == 1  # type: ignore[arg-type]
    assert time_generate(model, processor, image, PROMPT, 64, 5).generated_tokens == 5


def test_answers_of_a_candidate_share_the_system_prompt(candidate: Candidate) -> None:
    cache = PrefixCache()
    first, second = (
        time_generate(candidate.model, candidate.processor, Images()(number), PROMPT, 64, 2, cache)
        for number in range(2)
    )
    assert first.reused_tokens == 0
    assert second.reused_tokens == 14  # the positions in front of the image, which is new


def test_a_row_holds_every_metric_with_its_samples_and_no_image_is_shown_twice(candidate: Candidate) -> None:
    shown: list[int] = []

    class Recorded(Images):
        def __call__(self, number: int) -> bytes:
            shown.append(number)
            return super().__call__(number)

    images = Recorded((APPLE / "images" / "square.png").read_bytes())
    row = measure(candidate, images=images, prompt=PROMPT, resolution=64, runs=2, warmup=1, max_tokens=4)
    assert set(row.metrics) == {*PHASES, "wall_ttft", "paper_ttft", "decode_rate"} - {"load"}
    for metric in row.metrics.values():
        assert len(metric.samples) == 2
        assert min(metric.samples) > 0
    assert row.tokens == Tokens(visual=1, text=24, prompt=25, generated=4)
    assert (row.resolution, row.pixels) == (64, 64)
    assert row.memory.peak_bytes >= row.memory.active_bytes > 0
    assert set(row.precision.values()) == {"float32"}
    assert len(shown) == len(set(shown)) == 9
    assert len(candidate.prefix_cache) == 3


def test_a_cold_start_that_fails_says_why(tmp_path: Path, image: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"fastvlm generate failed: error: .*no such folder"):
        time_cold(tmp_path / "missing" / "folder", image, PROMPT, 64)


def test_random_models_stay_finite_and_tell_images_apart(candidate: Candidate) -> None:
    pixels = candidate.processor.prepare_images([Images()(0), Images()(1)], 128)
    visual = np.array(candidate.model.encode_image(pixels))
    assert np.isfinite(visual).all()
    assert np.abs(visual[0] - visual[1]).max() > 1e-3 * np.abs(visual).max()
