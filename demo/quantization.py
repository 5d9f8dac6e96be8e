"""Measures the accuracy of the quantized demo model on held-out questions and plots it over the model's size.

    python demo/quantization.py

The questions are those of the first seed of `evaluate.py`, so nobody can have looked at them. Writes
`quantization.json`, `quantization.md` (the README's table) and `quantization.png` into `build/`, or with `--record`
beside this file. Checkpoints and answers are stored under `--work`, so that an interrupted run continues where it
stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from evaluate import first_questions, folder_of
from scenes import scene_of

from fastvlm_mlx.convert.pipeline import convert_and_quantize
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.write.files import REPORTS, folder_bytes
from fastvlm_mlx.jobs.evaluate import evaluate, prediction_settings
from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
from fastvlm_mlx.jobs.predictions import Predictions
from fastvlm_mlx.jobs.questions import read_questions
from fastvlm_mlx.jobs.scores import EvaluationReport
from fastvlm_mlx.resolve import load, resolve

BASELINE = "fp16"
GROUP_SIZE = 32
"""The demo's layers are narrow."""

CALIBRATION = 32
"""Number of scenes to calibrate on, drawn like those of training; none is among the questions."""

VARIANTS = {
    "int8": Quantization(preset="int8", group_size=GROUP_SIZE),
    "mixed_4_8": Quantization(preset="mixed_4_8", group_size=GROUP_SIZE, method="gptq"),
    "mixed_4_6": Quantization(preset="mixed_4_6", group_size=GROUP_SIZE, method="gptq"),
    "int4": Quantization(preset="int4", group_size=GROUP_SIZE, method="gptq"),
    "int4-rtn": Quantization(preset="int4", group_size=GROUP_SIZE),
    "int3": Quantization(bits=3, group_size=GROUP_SIZE, method="gptq"),
    "int3-rtn": Quantization(bits=3, group_size=GROUP_SIZE),
}


def tensor_bytes(folder: Path) -> int:
    """Returns the bytes of the weights alone; the tokenizer would count for much beside them."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def calibration(folder: Path) -> Path:
    """Draws the calibration images into a folder and returns it."""
    folder.mkdir(exist_ok=True)
    for index in range(CALIBRATION):
        image, _ = scene_of(1, index, held_out=False)
        image.save(folder / f"{index:02}.png")
    return folder


def measure(model: str, questions: Path, work: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """Returns for each variant its sizes, its score and how it compares with the baseline."""
    source = resolve(model)
    rows = read_questions(questions)
    folders = {BASELINE: source}
    for name, quantization in VARIANTS.items():
        folders[name] = work / name
        if not folders[name].exists():
            convert_and_quantize(
                source, folders[name], quantization=quantization, calibration=[calibration(work / "calibration")]
            )
    reports: dict[str, EvaluationReport] = {}
    results = {}
    for name, folder in folders.items():
        network, processor = load(folder)
        settings = prediction_settings(network, checkpoint_fingerprint(folder))
        with Predictions(work / "answers", settings) as predictions:
            reports[name] = evaluate(network, processor, rows, limit=limit, predictions=predictions)
        comparison = reports[name].against(reports[BASELINE])
        results[name] = {
            "weight_bytes": tensor_bytes(folder),
            "folder_bytes": folder_bytes(folder, without=REPORTS),
            **asdict(reports[name].total),
            "kept": reports[name].total.score / max(reports[BASELINE].total.score, 1e-9),
            "agreement": asdict(comparison.agreement),
            "difference": [comparison.difference, comparison.low, comparison.high],
        }
        print(name, {key: results[name][key] for key in ("weight_bytes", "score", "kept")}, flush=True)
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the table of the README."""
    lines = ["| | weights | exact answers | difference in points | same answer |", "|---|---|---|---|---|"]
    whole = results[BASELINE]["weight_bytes"]
    for name, row in results.items():
        size = f"{row['weight_bytes'] / 1e6:.1f} MB ({row['weight_bytes'] / whole:.0%})"
        share, low, high = (100 * value for value in row["difference"])
        difference = "" if name == BASELINE else f"{share:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"| {name} | {size} | {row['score']:.1%} | {difference} | {row['agreement']['score']:.1%} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws accuracy over bytes, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, row in results.items():
        size, score = row["weight_bytes"] / 1e6, 100 * row["score"]
        spread = [[score - 100 * row["low"]], [100 * row["high"] - score]]
        axes.errorbar(size, score, yerr=spread, marker="o", markersize=5, capsize=3, label=name)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("exact answers, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model by quantization.")
    parser.add_argument("questions", type=Path, nargs="?", help="those of the first seed of evaluate.py by default")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("build/quantized"))
    parser.add_argument("--limit", type=int, help="ask only a sample of this many questions")
    parser.add_argument("--record", action="store_true", help="write beside this script, not into build/")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = measure(arguments.model, arguments.questions or first_questions(), arguments.work, arguments.limit)
    folder = folder_of(arguments.record)
    (folder / "quantization.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "quantization.md").write_text(table(results))
    plot(results, folder / "quantization.png")
    print(table(results))


if __name__ == "__main__":
    main()
