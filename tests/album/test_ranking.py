"""What words and asking say together."""

import pytest

from fastvlm_mlx.album.ranking import Match, rank

PHRASE, ALL, SOME = Match(1.0, "phrase"), Match(1.0, "all"), Match(0.5, "some")


def order(found, odds):
    return [number for number, _ in rank(found, odds)]


def shown(found, odds):
    return {number for number, score in rank(found, odds) if score >= 0.5}


def test_without_words_the_score_is_the_probability():
    assert dict(rank({}, {1: 0.0, 2: 2.0, 3: -30.0})) == pytest.approx({1: 0.5, 2: 0.8808, 3: 0.0}, abs=1e-4)


def test_before_asking_the_pictures_with_most_words_come_first():
    assert order({1: PHRASE, 2: ALL, 3: SOME}, {}) == [1, 2, 3]
    assert order({2: ALL, 3: SOME}, {1: 5.0}) == [1, 2, 3]


def test_asking_finds_what_no_caption_says_and_drops_what_only_captions_say():
    odds = dict.fromkeys(range(100), -6.0) | {1: 6.0, 2: 6.0, 3: 6.0, 50: 6.0}
    assert shown(dict.fromkeys((1, 2, 3, 60), PHRASE), odds) == {1, 2, 3, 50}


def test_one_wrong_caption_does_not_outweigh_asking():
    odds = dict.fromkeys(range(100), -6.0) | {1: 6.0, 2: 6.0}
    assert shown({60: PHRASE}, odds) == {1, 2}


def test_answers_that_do_not_depend_on_the_picture_are_not_believed():
    odds = dict.fromkeys(range(100), 8.0) | {1: 7.0, 2: 7.5, 3: 8.5, 4: 9.0}
    found = dict.fromkeys((1, 2, 3, 4), ALL)
    assert shown(found, odds) == {1, 2, 3, 4}
    assert set(order(found, odds)[:4]) == {1, 2, 3, 4}


def test_answers_that_agree_with_the_words_are_believed_for_other_pictures():
    odds = dict.fromkeys(range(100), -8.0) | dict.fromkeys((1, 2, 3, 4, 50), 8.0)
    assert shown(dict.fromkeys((1, 2, 3, 4), ALL), odds) == {1, 2, 3, 4, 50}
