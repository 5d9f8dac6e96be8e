"""Recent values are made once, and old ones are forgotten."""

import pickle

import pytest

from fastvlm_mlx.inputs.recent import Recent


def test_a_value_is_made_once_and_forgotten_when_others_are_newer():
    recent, made = Recent(2), []

    def get(key):
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "aabaca"] == list("AABACA")
    assert made == list("abc")  # a was asked for again before c took the place of b
    assert get("b") == "B"
    assert made == list("abcb")


def test_an_error_is_not_kept():
    recent = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 1) == 1


def test_a_copy_begins_empty_and_holds_as_many():
    recent = Recent(1)
    recent.get("a", lambda: 1)
    twin = pickle.loads(pickle.dumps(recent))
    assert [twin.get("a", lambda: 2), twin.get("b", lambda: 3), twin.get("a", lambda: 4)] == [2, 3, 4]
