"""Sentences of an answer that grows, and whether they say anything new."""

import pytest

from fastvlm_mlx.watch.sentences import Sentences, same, says_nothing, told

ANSWER = "A man sits at a desk. He is not Dr. Smith. 3.5 cups stand there!\nEXIT"
SENTENCES = ["A man sits at a desk.", "He is not Dr. Smith.", "3.5 cups stand there!", "EXIT"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_sentences_are_the_same_however_the_text_arrives(size: int) -> None:
    sentences = Sentences()
    found = [each for start in range(0, len(ANSWER), size) for each in sentences.add(ANSWER[start : start + size])]
    assert [*found, *sentences.finish()] == SENTENCES


def test_no_sentence_is_given_before_its_last_word_is_whole() -> None:
    sentences = Sentences()
    assert sentences.add("A man sits at a de") == []
    assert sentences.add("sk. ") == []  # a small letter may follow
    assert sentences.add("H") == ["A man sits at a desk."]


def test_what_an_answer_ends_with_is_told_without_a_full_stop() -> None:
    assert told("one. two", str.upper) == ["ONE. TWO"]
    assert told("STOP\n\n 50 \n", str) == ["STOP", "50"]
    assert told("红色的圆形。蓝色的方形。", str) == ["红色的圆形。", "蓝色的方形。"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A man is sitting at a desk.", "The man sits at the desk"),
        ("There are two dogs.", "two dogs"),
        ("The image shows a red car.", "A red car."),
    ],
)
def test_the_same_in_other_little_words_is_the_same(first: str, second: str) -> None:
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The light is red.", "The light is green."),
        ("A red circle and a blue cross.", "A blue circle and a red cross."),
        ("Two people.", "Three people."),
        ("红色的圆形。", "蓝色的圆形。"),
        ("The door is open.", "The door is not open."),
        ("It is.", "It was not."),
    ],
)
def test_one_word_that_matters_is_a_difference(first: str, second: str) -> None:
    assert not same(first, second)


@pytest.mark.parametrize(
    "sentence",
    ["Unchanged.", "Scene unchanged", "The scene remains the same.", "No changes.", "Nothing new.", "...", ""],
)
def test_that_nothing_has_changed_is_nothing_to_tell(sentence: str) -> None:
    assert says_nothing(sentence)
    assert told(sentence, str) == []


@pytest.mark.parametrize("sentence", ["The same man is back.", "No people.", "Nothing.", "no", "0"])
def test_other_short_answers_are_told(sentence: str) -> None:
    assert not says_nothing(sentence)
