"""A share of the kills, at fixed moments; `make stress` kills every job at many."""

import signal
from pathlib import Path

import pytest

from tests.stress import kills


@pytest.mark.parametrize(("name", "number"), [("archive", signal.SIGTERM), ("first use", signal.SIGKILL)])
def test_after_a_kill_the_next_run_is_right_and_nothing_is_left(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    expected, seconds = kills.reference(name, tmp_path / "alone")
    kills.kill(name, number, 0.7 * seconds, expected, tmp_path / "killed")
