"""The newest frame of a stream."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.watch import newest as module
from fastvlm_mlx.watch.newest import Newest, paced
from tests.watch.pictures import BLACK, FakeStream


def read(newest: Newest) -> None:
    newest.start()
    newest.join(60)


def test_only_the_newest_frame_is_kept_and_the_others_are_counted() -> None:
    newest = Newest(iter(FakeStream([BLACK] * 30)), lambda: None)
    read(newest)
    assert not newest.ended
    arrived = newest.take()
    assert arrived is not None
    assert arrived.frame.time == pytest.approx(2.9)
    assert (newest.count, newest.dropped, newest.take(), newest.ended) == (30, 29, None, True)


def test_no_frame_is_read_ahead_of_one_that_waits() -> None:
    given: list[int] = []
    may_go_on = threading.Semaphore(0)

    def frames() -> Any:
        for number, frame in enumerate(FakeStream([BLACK] * 3)):
            given.append(number)
            yield frame
            may_go_on.acquire(timeout=60)

    rung = threading.Event()
    newest = Newest(frames(), rung.set)
    newest.start()
    for number in range(3):
        assert rung.wait(60)
        rung.clear()
        assert newest.take() is not None
        assert given[-1] == number
        may_go_on.release()
    newest.join(60)
    assert newest.dropped == 0


def test_what_ends_a_stream_is_raised_after_its_last_frame() -> None:
    newest = Newest(iter(FakeStream([BLACK], error=ImageError("@camera: unplugged"))), lambda: None)
    read(newest)
    assert not newest.ended
    assert newest.take() is not None
    with pytest.raises(ImageError, match="unplugged"):
        _ = newest.ended


def test_the_bell_rings_for_each_frame_and_at_the_end() -> None:
    rung: list[int] = []
    read(Newest(iter(FakeStream([BLACK] * 3)), lambda: rung.append(1)))
    assert len(rung) == 4


def test_a_film_by_the_clock_waits_for_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 50.0))
    slept: list[float] = []
    stream: Any = FakeStream([BLACK] * 5)
    assert len(list(paced(stream, slept.append))) == 5
    assert slept == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_film_that_is_read_too_slowly_runs_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[-1]))
    stream: Any = FakeStream([BLACK] * 40)
    slept: list[float] = []
    frames = paced(stream, slept.append)
    next(frames)
    now.append(150.0)
    next(frames)
    next(frames)
    assert slept == pytest.approx([0.1])
