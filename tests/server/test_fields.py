"""Reading a JSON object key by key."""

import pytest

from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.fields import Fields


@pytest.mark.parametrize(
    ("method", "options", "right", "wrong"),
    [
        ("text", {}, ["a", ""], [1, True, [], {}]),
        ("text", {"among": ("a", "b")}, ["b"], ["c"]),
        ("whole", {"least": 1, "most": 9}, [1, 9, 4.0], [0, 10, 4.5, True, "4", [4], 1e300]),
        ("number", {"least": 0.0, "most": 2.0}, [0, 2, 0.5], [-0.1, 2.1, True, "1", [1]]),
        ("flag", {}, [True, False], [0, 1, "true", []]),
        ("array", {}, [[], [1]], [{}, "[]", 1]),
        ("object", {}, [{}], [[], "{}", 1]),
        ("texts", {"most": 2}, ["a", ["a", "b"], []], ["", [""], ["a", "b", "c"], [1], 1, {}]),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(method, options, right, wrong):
    for value in right:
        getattr(Fields({"key": value}), method)("key", **options)
    for value in wrong:
        with pytest.raises(ApiError, match=r"^a\.key must be ") as error:
            getattr(Fields({"key": value}, "a."), method)("key", **options)
        assert (error.value.status, error.value.param) == (400, "a.key")


def test_null_counts_as_absent():
    fields = Fields({"key": None})
    assert "key" not in fields
    assert fields.whole("key", 5) == 5
    assert fields.texts("key") == ()
    assert fields.unknown() == ()


def test_what_was_never_read_is_known_by_its_whole_name():
    fields = Fields({"known": 1, "other": 2, "nested": {"known": 1, "other": 2}})
    fields.whole("known")
    nested = fields.object("nested")
    nested.whole("known")
    assert fields.unknown() == ("other", "nested.other")
    fields.ignore("other")
    assert fields.unknown() == ("nested.other",)


@pytest.mark.parametrize("empty", [None, False, [], {}, ""])
def test_a_key_that_asks_for_nothing_is_not_refused(empty):
    Fields({"tools": empty}).refuse({"tools": "there are none"})
    with pytest.raises(ApiError, match=r"^tools is not supported: there are none; leave it out$"):
        Fields({"tools": [1]}).refuse({"tools": "there are none"})
