"""A share of the damaged pictures, prompts, question files and arguments, always with the same seeds."""

from tests.fuzz import driver
from tests.fuzz.test_files import COUNT, FILES, assert_good


def test_damaged_inputs_are_refused_in_one_line_or_used_right() -> None:
    assert_good([name for name in driver.cases(COUNT, 0) if not name.startswith(FILES)])
