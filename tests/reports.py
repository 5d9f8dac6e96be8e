"""Reports of `fastvlm bench` with made-up figures."""

from typing import Any

from fastvlm_mlx.bench import report
from fastvlm_mlx.bench.candidate import PARTS
from fastvlm_mlx.bench.statistics import Statistics

PROMPT = "Describe the image."


def make_report(wall: float, rate: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A report with one row."""
    metrics = {
        "wall_ttft": {"unit": "s", **vars(Statistics.of([wall] * 3)), "samples": [wall] * 3},
        "decode_rate": {"unit": "tokens/s", **vars(Statistics.of([rate])), "samples": [rate]},
        **{
            stage: {"unit": "s", **vars(Statistics.of([wall / 7])), "samples": [wall / 7]}
            for stage in ("load", "decode", "preprocess", "vision", "projector", "prefill", "first_token")
        },
    }
    row = {
        "model": "0.5b",
        "precision": dict.fromkeys(PARTS, "float16"),
        "hidden_size": 896,
        "resolution": 1024,
        "pixels": 1024,
        "tokens": {"visual": 256, "text": 27, "prompt": 283, "generated": 32},
        "memory": {"peak_bytes": 1_500_000_000},
        "metrics": metrics,
        **changes,
    }
    return report.make_report({"chip": "Apple M0", "device": "gpu"}, {"runs": 3, "prompt": PROMPT}, [row])
