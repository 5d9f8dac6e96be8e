"""An examination goes on when a step cannot run, and keeps what it has when it is interrupted."""

from collections.abc import Iterator

import pytest

from fastvlm_mlx.doctor.checks import Check, Examination, Step, Undone
from fastvlm_mlx.errors import CheckpointError

RIGHT = Check(part="speed", name="right", value=1.0, ok=True)
WRONG = Check(part="speed", name="wrong", value=1.0, ok=False)


def step(name: str, *results: Check | BaseException) -> Step:
    def run() -> Iterator[Check]:
        for result in results:
            if isinstance(result, BaseException):
                raise result
            yield result

    return Step(name=name, run=run)


@pytest.mark.parametrize("error", [CheckpointError("no"), RuntimeError("no"), MemoryError("no"), OSError("no")])
def test_a_step_that_fails_is_named_and_the_next_one_runs(error: Exception) -> None:
    examination = Examination()
    names: list[str] = []
    examination.run([step("a", RIGHT, error, WRONG), step("b", WRONG)], names.append)
    assert examination.checks == [RIGHT, WRONG]
    assert examination.wrong == [WRONG]
    assert examination.undone == [Undone(name="a", reason="no")]
    assert names == ["a", "b"]


def test_an_interruption_keeps_what_was_found_and_names_the_rest() -> None:
    examination = Examination()
    with pytest.raises(KeyboardInterrupt):
        examination.run([step("a", RIGHT), step("b", WRONG, KeyboardInterrupt()), step("c", RIGHT)])
    assert examination.checks == [RIGHT, WRONG]
    assert [(each.name, each.reason) for each in examination.undone] == [("b", "interrupted"), ("c", "interrupted")]


def test_a_mistake_in_a_check_is_no_finding() -> None:
    with pytest.raises(AttributeError):
        Examination().run([step("a", AttributeError("a bug"))])


def test_nan_is_not_below_a_limit() -> None:
    assert Check.below("speed", "a", 1.0, 1.0, "").ok
    assert not Check.below("speed", "a", float("nan"), 1.0, "").ok
