"""Stop strings."""

import pytest

from fastvlm_mlx.generation.stop import StopStrings


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        (("END",), ["abcE", "N", "Dxyz"], ["abc", "", ""]),
        (("END",), ["abcE", "N", "xyz"], ["abc", "", "ENxyz"]),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""]),
        (("\n\n", "."), ["one\n", "two.", "three"], ["one", "\ntwo"]),
        ((), ["abc"], ["abc"]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop, pieces, shown):
    stream, got = StopStrings(stop), []
    for piece in pieces:
        text, ended = stream.add(piece)
        got.append(text)
        if ended:
            break
    assert got == shown
