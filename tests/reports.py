"""Reports of `fastvlm bench` with made-up figures."""

from typing import Any

from fastvlm_mlx.backend import BLAS
from fastvlm_mlx.bench.candidate import PARTS
from fastvlm_mlx.bench.conditions import Conditions
from fastvlm_mlx.bench.measure import PHASES
from fastvlm_mlx.bench.report import Memory, Report, Row, Settings, Tokens
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.machine import Machine


def make_conditions(**changes: Any) -> Conditions:
    """The conditions of a machine that does not exist; `changes` are fields of `Machine`."""
    machine: dict[str, Any] = {
        "device": "gpu",
        "chip": "Apple M0",
        "cores": 8,
        "memory": 16_000_000_000,
        "system": "macOS 26.0 arm64",
        "python": "3.12.0",
        "mlx": "0.32.0",
    }
    return Conditions(
        time="2026-01-01T00:00:00+00:00",
        fastvlm_mlx="0.1.0",
        machine=Machine(**machine | changes),
        blas=BLAS(name="Accelerate"),
        load_average=(0.0, 0.0, 0.0),
        power=None,
    )


def make_row(wall: float = 1.0, rate: float = 10.0, **changes: Any) -> Row:
    """A row whose phases take a seventh of the wall TTFT each."""
    row: dict[str, Any] = {
        "model": "0.5b",
        "weights_sha256": None,
        "source": {},
        "precision": dict.fromkeys(PARTS, "float16"),
        "hidden_size": 896,
        "resolution": 1024,
        "pixels": 1024,
        "tokens": Tokens(visual=256, text=27, prompt=283, generated=32),
        "memory": Memory(peak_bytes=1_500_000_000, active_bytes=1_400_000_000, process_peak_bytes=1_600_000_000),
        "metrics": {
            "wall_ttft": Metric(unit="s", samples=(wall,) * 3),
            "decode_rate": Metric(unit="tokens/s", samples=(rate,)),
            **{phase: Metric(unit="s", samples=(wall / 7,)) for phase in PHASES},
        },
    }
    return Row(**row | changes)


def make_report(*rows: Row, runs: int = 3, **changes: Any) -> Report:
    """A report with these rows, by default with one; `changes` are fields of `Machine`."""
    settings = Settings(prompt="Describe the image.", image_sha256=None, runs=runs, warmup=3, max_tokens=32)
    return Report(conditions=make_conditions(**changes), settings=settings, rows=rows or (make_row(),))
