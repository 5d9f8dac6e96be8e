"""Asking about pictures by their visual tokens."""

import numpy as np
import pytest

from fastvlm_mlx import PromptError, choose
from fastvlm_mlx.album import asking
from fastvlm_mlx.album.asking import Asker, Inquiry, check_query, check_template, probability
from tests.checkpoints import APPLE


@pytest.fixture(scope="module")
def shown(loaded):
    model, processor = loaded
    images = sorted((APPLE / "images").glob("*.png"))
    return images, np.array(model.encode_image(processor.prepare_images(images)))


def certain(pairs):
    """A scorer that gives one pair of answers most of the probability."""

    def scorer(self, question, spellings):
        likely = pairs.get(question, None)

        def score(visual_tokens):
            values = [-1.0 if word in (likely or ()) else -9.0 for pair in spellings for word in pair]
            return np.tile(values, (len(visual_tokens), 1))

        return score

    return scorer


def test_the_odds_are_those_of_choose_between_yes_and_no(loaded, shown, monkeypatch):
    model, processor = loaded
    images, visual_tokens = shown
    inquiry = Asker(model, processor, "", template="Is there {} here?").ask("a cat")
    first, later = inquiry(list(visual_tokens)), inquiry(list(visual_tokens[:1]))
    words = max(
        asking._YES_NO,
        key=lambda pair: sum(
            np.exp(each.logprob)
            for image in images
            for each in choose(model, processor, pair, image=image, prompt="Is there a cat here?")
        ),
    )
    for image, odds in zip(images, first, strict=True):
        yes, _ = choose(model, processor, words, image=image, prompt="Is there a cat here?")
        assert probability(odds) == pytest.approx(yes.probability, abs=1e-4)
    assert later[0] == pytest.approx(first[0], abs=1e-4)


def test_the_model_decides_in_which_spelling_it_says_yes(loaded, shown, monkeypatch):
    monkeypatch.setattr(Asker, "scorer", certain({"Is there x in the picture?": ("Yes", "No")}))
    asker = Asker(*loaded, "")
    asker.ask("x")(list(shown[1]))
    assert asker.suited(asker.templates("x")) == (asking.ENGLISH[0], ("Yes", "No"))


def test_a_model_that_says_more_is_told_to_say_yes_or_no(loaded, shown, monkeypatch):
    told = "Is there x in the picture? Answer yes or no."
    monkeypatch.setattr(Asker, "scorer", certain({told: ("yes", "no")}))
    asker = Asker(*loaded, "")
    asker.ask("x")(list(shown[1]))
    assert asker.suited(asker.templates("x")) == (asking.ENGLISH[1], ("yes", "no"))


@pytest.mark.parametrize(
    ("template", "query", "question", "yes"),
    [
        (None, "a red car", "Is there a red car in the picture?", "yes"),
        (None, "红色的车", "图片里有红色的车吗?", "有"),
        ("Does this picture show {}?", "红色", "Does this picture show 红色?", "yes"),
        ("这是{}吗?", "car", "这是car吗?", "有"),
        ("What about {}?", "{}", "What about {}?", "yes"),
    ],
)
def test_the_question_and_its_answers_are_in_one_language(loaded, template, query, question, yes):
    asker = Asker(*loaded, "", template=template)
    templates = asker.templates(query)
    assert templates[0].replace("{}", query) == question
    assert asking.spellings_of(templates[0])[0][0] == yes


def test_small_batches_take_many_pictures_and_large_ones_few(loaded):
    asker = Asker(*loaded, "")
    inquiry: Inquiry = asker.ask("x")
    assert inquiry.batch(16) > inquiry.batch(256) >= 1
    assert Asker(*loaded, "", batch=3).ask("x").batch(16) == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the query is empty; say what the pictures should show, such as 'a red car'"),
        (" \n\t", "the query is empty"),
        ("a" * 10_000, "the query has 10000 characters (aaaaaaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaaaa); the most are 1000"),
        ("\ud800", "the query is not valid Unicode"),
    ],
)
def test_a_query_of_nothing_or_too_much_is_refused(query, message):
    with pytest.raises(PromptError) as error:
        check_query(query)
    assert message in str(error.value)


@pytest.mark.parametrize("template", ["", "Is it?", "{}", " {} ", "{} and {}"])
def test_a_question_has_one_place_for_the_query(template):
    with pytest.raises(PromptError, match=r"must have \{\} once"):
        check_template(template)
