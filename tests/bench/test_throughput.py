"""Many questions at once: every answer is counted, in one process and through a server."""

from pathlib import Path

import pytest

from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.clients import Clients
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.bench.throughput import ENGINE, SERVER, Load, Row, Throughput, report, tables
from fastvlm_mlx.cli.throughput import served
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.checkpoints import APPLE
from tests.reports import make_conditions

LOAD = Load(prompt="Describe the image.", resolution=128, max_tokens=3, runs=1)


class Recorded(Images):
    """Remembers which images were shown."""

    def __init__(self) -> None:
        super().__init__((APPLE / "images" / "tiny.png").read_bytes())
        self.shown: list[int] = []

    def __call__(self, number: int) -> bytes:
        self.shown.append(number)
        return super().__call__(number)


@pytest.fixture
def candidate(loaded: tuple[FastVLM, FastVLMProcessor]) -> Candidate:
    return Candidate(name="tiny", model=loaded[0], processor=loaded[1])


def test_every_image_is_new_and_every_answer_has_its_length(candidate: Candidate) -> None:
    images = Recorded()
    measured = Throughput(candidate, LOAD, images)
    measured.engine(1)
    measured.engine(2)
    with served(candidate, 2) as port, Clients() as clients:
        measured.server(port, clients, 2)
    rows = list(measured.rows())
    assert [(row.way, row.at_once, row.answers) for row in rows] == [(ENGINE, 1, 2), (ENGINE, 2, 4), (SERVER, 2, 4)]
    for row in rows:
        answers, tokens = row.metrics["answers"].samples, row.metrics["tokens"].samples
        assert [3 * rate for rate in answers] == pytest.approx(tokens)
    assert len(rows[2].metrics["first_token"].samples) == 4
    assert len(images.shown) == len(set(images.shown)) == 10
    assert report(rows, LOAD, make_conditions())["rows"][2]["metrics"]["first_token"]["n"] == 4


def test_a_batch_has_as_many_rows_as_requested(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    init = Engine.__init__

    def recorded(self: Engine, *arguments: object, max_batch: int, **options: object) -> None:
        batches.append(max_batch)
        init(self, *arguments, max_batch=max_batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "__init__", recorded)
    Throughput(candidate, LOAD, Recorded()).engine(4)
    assert batches == [4]


def test_the_warm_up_is_not_counted(candidate: Candidate) -> None:
    measured = Throughput(candidate, LOAD, Recorded())
    measured.engine(1)
    measured.forget()
    assert list(measured.rows()) == []


def test_factors_are_relative_to_one_at_once_in_the_same_way() -> None:
    def row(way: str, at_once: int, rate: float, **more: Metric) -> Row:
        metrics = {
            "answers": Metric(unit="pictures/s", samples=(rate / 10,)),
            "tokens": Metric(unit="tokens/s", samples=(rate,)),
            **more,
        }
        return Row(model="m", precision="float32", way=way, at_once=at_once, answers=2, metrics=metrics)

    first = Metric(unit="s", samples=(0.1, 0.2, 0.4))
    rows = [row(ENGINE, 1, 5), row(ENGINE, 8, 20), row(SERVER, 8, 15, first_token=first)]
    ((title, lines),) = tables(rows, LOAD)
    assert title == "m, float32, 128 px: answers of 3 tokens, one run"
    assert [line[4] for line in lines[1:]] == ["", "4.0×", ""]
    assert lines[3] == [SERVER, "8", "1.5", "15.0", "", "200 ms", "360 ms"]


def test_a_question_that_the_server_refuses_ends_the_measurement(tmp_path: Path, candidate: Candidate) -> None:
    with served(candidate, 1) as port, Clients() as clients, pytest.raises(RuntimeError, match="clients' process"):
        clients.ask(port, [{"messages": []}])
