"""A segment that is slow for its size is named; times stand beside what the chip allows."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.costs import Chip
from fastvlm_mlx.doctor import speed
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.speed import find_chip, prepared_segments, segment_speed, slow_segments, staged, throughput
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM

Loaded = tuple[FastVLM, FastVLMProcessor]


def test_a_slow_segment_is_named(loaded: Loaded) -> None:
    segments = prepared_segments(loaded[0])
    stage = segments["stages.2"]

    def slow(x: mx.array) -> mx.array:
        time.sleep(0.2)
        return stage(x)

    checks = list(segment_speed(loaded[0], {**segments, "stages.2": slow}, runs=1))
    assert [check.name for check in checks if not check.ok] == ["stages.2"]
    assert len(checks) == 8  # the stem, five stages, conv_exp, the projector


def test_segments_are_compared_for_their_size() -> None:
    sizes = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert all(check.ok for check in slow_segments({"a": 3.0, "b": 6.0, "c": 12.0}, sizes))
    assert [check.ok for check in slow_segments({"a": 90.0, "b": 6.0, "c": 12.0}, sizes)] == [False, True, True]


def test_a_small_segment_is_never_called_slow() -> None:
    """Its launches dominate it, and nobody waits for it."""
    sizes = {"a": 0.001, "b": 2.0, "c": 4.0}
    assert all(check.ok for check in slow_segments({"a": 0.5, "b": 6.0, "c": 12.0}, sizes))


def test_a_chip_is_found_by_the_name_that_macos_gives() -> None:
    chip = find_chip("Apple M2 Pro")
    assert chip is not None
    assert chip.name == "M2 Pro"
    assert find_chip("AMD EPYC") is None


def test_times_stand_beside_the_least_time_of_the_chip(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("vision tower", "projector", "prefill", "decode step")
    cost = [SimpleNamespace(part=part, roofline=lambda chip: 1e-6) for part in parts]  # a second's work to compute
    monkeypatch.setattr(speed, "costs", lambda *_: cost)
    candidate = Candidate(name="golden", model=loaded[0], processor=loaded[1])
    slowest = Chip(name="M0", tflops=1e-3, bandwidth_gb_s=0.1)
    found = {check.name: check for check in staged(candidate, slowest, runs=1)}
    assert {"vision", "projector", "prefill", "one token", "first token at 128 px"} <= found.keys()
    assert "times the least time of an M0" in found["vision"].reason
    assert not found["decode"].reason  # of the image, on the CPU


def test_throughput_is_given_for_batches(loaded: Loaded) -> None:
    candidate = Candidate(name="golden", model=loaded[0], processor=loaded[1])
    checks: list[Check] = list(throughput(candidate, tokens=4, repeats=1))
    assert [check.name for check in checks] == ["1 row at a time", "4 rows at a time", "8 rows at a time"]
    assert all(float(np.float64(str(check.value).split()[0])) > 0 for check in checks)
