"""The model behind a server: its names, and how long those that find no room have to wait."""

import pytest

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.resolve import resolve
from fastvlm_mlx.server import service as module
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.loading import license_of, load_engine, names_of
from fastvlm_mlx.server.service import Rate, Service
from fastvlm_mlx.server.settings import Settings


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_that_of_answers_and_not_of_pauses(clock):
    rate = Rate()
    rate.begin()
    for _ in range(20):
        clock[0] += 0.5
        rate.add(1)
    clock[0] += 3600
    rate.begin()
    clock[0] += 0.5
    rate.add(1)
    assert rate.seconds == pytest.approx(0.5)


def test_the_rate_follows_a_change(clock):
    rate = Rate()
    rate.begin()
    for seconds in (8.0, *[1.0] * 50):
        clock[0] += seconds
        rate.add(1)
    assert rate.seconds == pytest.approx(1.0, abs=0.1)
    clock[0] += 8.0
    rate.add(8)
    assert rate.seconds == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("running", "seconds", "expected"), [(0, 1.0, 1), (10, 3.0, 15), (3, 0.1, 1), (80, 60.0, 120)])
def test_clients_come_back_when_half_is_answered(monkeypatch, running, seconds, expected):
    service = Service("demo", Settings())
    monkeypatch.setattr(Service, "running", running)
    service._rate.seconds = seconds
    assert service.retry_after() == expected


@pytest.mark.parametrize(
    ("model", "name", "aliases"),
    [
        ("demo", "demo", ()),
        ("0.5b", "apple/FastVLM-0.5B", ("FastVLM-0.5B", "0.5b")),
        ("apple/FastVLM-7B", "apple/FastVLM-7B", ("FastVLM-7B", "7b")),
        ("someone/model", "someone/model", ("model",)),
        ("/models/mine", "mine", ("/models/mine",)),
        ("./mine/", "mine", ("./mine/",)),
        ("mine.zip", "mine", ("mine.zip",)),
    ],
)
def test_a_model_is_called_by_its_id_or_the_name_of_its_folder(model, name, aliases):
    assert names_of(model) == (name, aliases)


def test_a_licence_is_told_if_it_is_known():
    config = ModelConfig.from_path(resolve("demo"))
    assert license_of("demo", config) == "mit"
    assert license_of("apple/FastVLM-0.5B", config) == "apple-amlr"
    assert license_of("mine", config) == ""


def test_what_is_loaded_is_described_and_warm():
    service = Service("demo", Settings())
    with load_engine(service, service.settings, "demo", max_batch=2) as engine:
        assert service.fingerprint.startswith("fp_")
        assert service.fingerprint.endswith("_0.1.0")
        service.start(engine)
        assert (service.state, service.max_model_len, service.native_resolution) == ("ready", 2048, 192)
        assert engine._worker._thread is not None


def test_what_loading_does_is_told(monkeypatch):
    service = Service("demo", Settings())
    shown = []

    def fingerprint(folder, cache, progress):
        progress(1, 4, "reading demo")
        shown.append(service.activity)
        return "0" * 64

    monkeypatch.setattr("fastvlm_mlx.server.loading.checkpoint_fingerprint", fingerprint)
    monkeypatch.setattr("fastvlm_mlx.server.loading.warm_up", lambda *_: shown.append(service.activity))
    with load_engine(service, service.settings, "demo") as engine:
        service.start(engine)
    assert shown == ["reading demo: 25%", "warming up"]
    assert service.activity == ""


def test_a_server_that_was_told_to_stop_while_it_loaded_answers_nothing(demo):
    service = Service("demo", Settings())
    service.stop()
    with load_engine(service, service.settings, "demo", warmup=False) as engine:
        service.start(engine)
        with pytest.raises(ApiError, match="the server is stopping"):
            service.submit([Request()])


def test_settings_that_no_request_would_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--max-queue-body must be at least --max-body"):
        Settings(max_queue_bytes=10)
    with pytest.raises(ConfigError, match=r"--media-root .*nowhere: no such folder"):
        Settings(media_root=tmp_path / "nowhere")
