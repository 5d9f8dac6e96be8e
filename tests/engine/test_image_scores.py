"""Scores of given answers about many images at once."""

import numpy as np
import pytest

from fastvlm_mlx import choose
from fastvlm_mlx.engine.image_scores import ImageScorer
from fastvlm_mlx.inputs.tokenizer_files import IM_END
from tests.checkpoints import APPLE

QUESTION = "Is there a red circle?"
CHOICES = ("yes", "no", "perhaps not")


def scorer(model, processor):
    end = processor.tokenizer.token_id(IM_END)
    choices = [[*processor.tokenizer.encode(text), end] for text in CHOICES]
    return ImageScorer(model, processor.encode(QUESTION, 1), choices)


@pytest.fixture(scope="module")
def shown(loaded):
    """The images of the golden checkpoint, and their visual tokens."""
    model, processor = loaded
    images = sorted((APPLE / "images").glob("*.png"))
    return images, np.array(model.encode_image(processor.prepare_images(images)))


# Sums of float32 logarithms of about 6 each: blocks of another size move the last digits.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def test_scores_are_those_of_choose(loaded, shown):
    model, processor = loaded
    images, visual_tokens = shown
    scores = scorer(model, processor)(visual_tokens)
    for image, row in zip(images, scores, strict=True):
        expected = [each.logprob for each in choose(model, processor, CHOICES, image=image, prompt=QUESTION)]
        np.testing.assert_allclose(row, expected, **TOLERANCE)


def test_a_score_does_not_depend_on_the_neighbours(loaded, shown):
    score = scorer(*loaded)
    together = score(shown[1])
    assert np.ptp(together[:, 0]) > 1e-3  # else no mix-up could be seen
    for place, row in enumerate(together):
        np.testing.assert_allclose(score(shown[1][place : place + 1])[0], row, **TOLERANCE)
    np.testing.assert_allclose(score(shown[1][::-1])[::-1], together, **TOLERANCE)
