"""The comparison with other programs in `benchmarks/`, without the other programs."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from fastvlm_mlx.bench.candidate import PARTS
from fastvlm_mlx.bench.statistics import Metric
from tests.reports import make_conditions, make_report, make_row

VERSIONS = {"mlx": "1", "mlx-vlm": "2", "transformers": "3", "torch": "4"}


def sample(warm: float = 1.0) -> peers.Sample:
    return peers.Sample(
        load_average=0.5, cold_ttft=2 * warm, warm_ttft=warm, decode_rate=5.0, peak_bytes=10**9, tokens=(1, 2)
    )


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The samples that were measured, by peers that need no environment and no checkpoint."""
    measured: list[tuple[str, int, int]] = []

    def measure(place: object, peer: peers.Peer, resolution: int, run: int) -> tuple[peers.Sample, dict[str, str]]:
        measured.append((peer.name, resolution, run))
        if len(measured) == 5 and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        return sample(1.0 if peer is peers.OURS else 3.0), VERSIONS

    answer = peers.Answer(tokens=(1, 2), margins=(0.5, 0.5), difference=1e-5)
    monkeypatch.setattr(peers, "sample", measure)
    monkeypatch.setattr(peers, "agree", lambda place, peers, resolution: {"mlx-vlm": answer})
    monkeypatch.setattr(peers, "bfloat16_instructions", lambda: ())
    monkeypatch.setattr(peers.Workplace, "python", lambda self, peer: Path(sys.executable))
    monkeypatch.setattr(peers.Workplace, "checkpoint", lambda self, peer, dtype=None: tmp_path)
    return measured


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "peers.json"
    options = ["--resolutions", "256", "512", "--runs", "2", "--work", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["peers.py", *options, *arguments])
    peers.main()
    return dict(json.loads(output.read_text()))


def test_an_interrupted_comparison_continues_where_it_stopped(
    work: list[tuple[str, int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch)
    report = run(tmp_path, monkeypatch)
    assert [name for name, _, _ in work[:3]] == ["fastvlm-mlx", "mlx-vlm", "transformers"]
    assert work[3] == ("fastvlm-mlx", 512, 0)
    assert len(work) == 13  # 12 samples and the one that was interrupted
    assert [len(results) for side in report["samples"].values() for results in side.values()] == [2] * 6
    out = capsys.readouterr().out
    assert "| warm TTFT | 512 px | 1.00 s | 3.00 s (3.0×) | 3.00 s (3.0×) |" in out
    assert "| decoding | 512 px | 5.0 tokens/s | 5.0 tokens/s (1.0×) | 5.0 tokens/s (1.0×) |" in out
    assert "are equal" in out
    assert str(tmp_path) not in (tmp_path / "peers.json").read_text()


def test_tracked_results_change_only_when_they_are_to_be_recorded(
    work: list[tuple[str, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted").touch()
    for name in ("RESULTS", "BUILD"):
        monkeypatch.setattr(peers, name, tmp_path / name)
    tracked, readme = tmp_path / "RESULTS" / peers.file_name("0.5b"), tmp_path / "README.md"
    readme.write_text(f"{peers.BEGIN}\nearlier\n{peers.END}\n")
    monkeypatch.setattr(peers, "README", readme)
    arguments = ["peers.py", "--resolutions", "256", "--runs", "1", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    peers.main()
    assert "earlier" in readme.read_text()
    assert not tracked.exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--record"])
    peers.main()
    assert len(work) == 3  # continued from build/, where nothing was missing
    assert tracked.read_text() == (tmp_path / "BUILD" / tracked.name).read_text()
    assert "earlier" not in readme.read_text()


def test_pytorch_takes_part_in_bfloat16_where_a_cpu_has_instructions_for_it(
    work: list[tuple[str, int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "interrupted").touch()
    monkeypatch.setattr(peers, "device", lambda: "gpu")
    monkeypatch.setattr(peers, "bfloat16_instructions", lambda: ("amx_bf16",))
    assert "transformers-bfloat16" not in {peer.name for peer in peers.default_peers()}
    monkeypatch.setattr(peers, "device", lambda: "cpu")
    report = run(tmp_path, monkeypatch)
    assert {name for name, _, _ in work} == {peer.name for peer in peers.PEERS}
    assert report["instructions"] == ["amx_bf16"]
    out = capsys.readouterr().out
    assert "| | | fastvlm-mlx | mlx-vlm | transformers | transformers, bfloat16 |" in out
    assert " with amx_bf16, " in out
    assert "float32 arithmetic where a column names no other" in out


def test_a_peer_in_another_dtype_shares_environment_and_checkpoint_and_asks_for_its_dtype(tmp_path: Path) -> None:
    settings = peers.Settings(size="0.5b", dtype="float32", threads=2, images=2)
    place = peers.Workplace(tmp_path, tmp_path / "venvs", settings)
    (tmp_path / "venvs" / "peers-transformers").mkdir(parents=True)
    (tmp_path / "venvs" / "peers-transformers" / ".installed").touch()
    (tmp_path / "transformers-0.5b-bfloat16").mkdir()
    plain, bfloat16 = peers.PEERS[-2:]
    assert place.python(plain) == place.python(bfloat16)
    assert place.checkpoint(plain) == place.checkpoint(bfloat16)
    dtypes = [peers._request(settings, peer, "", [], 256)["dtype"] for peer in (plain, bfloat16)]
    assert dtypes == ["float32", "bfloat16"]


def test_answers_that_compare_differently_get_sentences_of_their_own() -> None:
    same = peers.Answer(tokens=(1, 2), margins=(0.5, 0.5), difference=1e-5)
    tie = peers.Answer(tokens=(1, 3), margins=(0.5, 0.1), difference=0.1, equal=False)
    report = peers.Report(
        conditions=make_conditions(),
        settings=peers.Settings(size="0.5b", dtype="float32", threads=2, images=2),
        agreement={256: {"transformers": same, "transformers-bfloat16": tie}},
    )
    text = peers.verdict(report, peers.PEERS)
    assert "of fastvlm-mlx and transformers are equal (256 px)" in text
    assert "of fastvlm-mlx and transformers, bfloat16 part where two candidates tie (256 px)" in text


def test_other_settings_do_not_continue_a_report(
    work: list[tuple[str, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted").touch()
    run(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match="other settings"):
        run(tmp_path, monkeypatch, "--threads", "77")


def test_answers_agree_or_a_tie_explains_where_they_part() -> None:
    def compare(*tokens: int, margin: float = 1.0) -> tuple[bool, bool]:
        theirs = peers.Answer(tokens=tokens, margins=(1.0, margin, 1.0))
        answer = peers.compare(ours, theirs, difference=0.001, tolerance=1e-2)
        assert (answer.tokens, answer.difference) == (tokens, 0.001)
        return answer.equal, answer.explained

    ours = peers.Answer(tokens=(1, 2, 3), margins=(1.0, 0.001, 1.0))
    assert compare(1, 2, 3) == (True, True)
    assert compare(1, 9, 9, margin=0.001) == (False, True)
    assert compare(7, 2, 3) == (False, False)


@pytest.mark.parametrize("path", sorted(peers.RESULTS.glob("peers-*.json")), ids=lambda path: path.name)
def test_committed_comparisons_are_read_without_loss(path: Path) -> None:
    assert json.loads(json.dumps(peers.read_report(path).to_dict())) == json.loads(path.read_text())


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{peers.BEGIN}\nearlier\n{peers.END}\nafter\n")
    report = peers.Report(
        conditions=make_conditions(chip="Chip", system="Linux", device="cpu"),
        settings=peers.Settings(size="0.5b", dtype="float32", threads=2, images=2),
        versions={peer.name: VERSIONS for peer in peers.PEERS},
        samples={256: {peer.name: [sample()] for peer in peers.PEERS}},
    )
    peers.write_tables([report], readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{peers.BEGIN}\n| |")
    assert text.endswith(f"{peers.END}\nafter\n")
    assert "earlier" not in text
    assert "not on a Mac" in text
    with pytest.raises(SystemExit, match="has no"):
        peers.write_tables([report], Path(__file__))


def test_a_report_of_our_own_phases_gets_a_table_too(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{peers.BEGIN}\n{peers.END}\n")
    metrics = {"wall_ttft": Metric(unit="s", samples=(0.5, 0.9, 0.9)), "vision": Metric(unit="s", samples=(0.4,))}
    row = make_row(model="0.5b, random", precision=dict.fromkeys(PARTS, "float32"), metrics=metrics)
    report = make_report(row, runs=7, chip="Chip", system="Linux", device="cpu")
    peers.write_tables([report], readme)
    text = readme.read_text()
    assert "| px | visual | prompt | wall TTFT | p90 | vision | peak GB |" in text
    assert "| 1024 | 256 | 283 | 900.0 | 900.0 | 400.0 | 1.50 |" in text
    assert "0.5b, random, float32, by phase: medians in ms of 7 runs" in text


def test_the_readme_has_the_markers() -> None:
    text = peers.README.read_text(encoding="utf-8")
    assert text.count(peers.BEGIN) == text.count(peers.END) == 1


def test_a_process_is_timed_to_its_first_character_and_weighed() -> None:
    code = "import time; print('a', flush=True); time.sleep(0.3); print('b')"

    def is_timed() -> bool:
        start = time.perf_counter()
        seconds, output, peak = peers.run_process([sys.executable, "-c", code], {})
        assert output == "a\nb\n"
        assert peak > 1 << 20
        return 0 < seconds < time.perf_counter() - start - 0.3

    assert any(is_timed() for _ in range(10))  # the reader of the first character may be held up
    with pytest.raises(SystemExit, match="no_such_module"):
        peers.run_process([sys.executable, "-c", "import no_such_module"], {})
