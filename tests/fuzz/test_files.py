"""A share of the damaged checkpoints, always with the same seeds; `make fuzz` tries any number."""

import pytest

from tests.fuzz import driver

COUNT = 3000
"""Cases of both files of tests together."""
FILES = ("upstream", "converted", "cache", "archive", "captions", "album", "command_line")


def assert_good(names: list[str]) -> None:
    outcomes = driver.run(names)
    if not all(outcome.good for outcome in outcomes):
        pytest.fail(driver.table(outcomes), pytrace=False)


def test_damaged_files_are_refused_in_one_line_or_read_right() -> None:
    assert_good([name for name in driver.cases(COUNT, 0) if name.startswith(FILES)])
