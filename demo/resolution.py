"""Measures and plots the accuracy of the demo model by kind of question at several resolutions.

    python demo/resolution.py

The questions are those of the first seed of `evaluate.py`, so nobody can have looked at them. Writes
`resolution.json` and `resolution.png` into `build/`, or with `--record` beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
from evaluate import first_questions, folder_of

from fastvlm_mlx import load
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.questions import read_questions

RESOLUTIONS = (128, 192, 256, 320)


def measure(model: str, questions: Path, limit: int | None) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {resolution: {kind: {count, score, low, high}}}; the kind "all" is over all questions."""
    loaded, processor = load(model)
    rows = read_questions(questions)
    results = {}
    for resolution in RESOLUTIONS:
        report = evaluate(loaded, processor, rows, limit=limit, resolution=resolution).to_dict()
        results[str(resolution)] = {**report["kinds"], "all": report["total"]}
        print(resolution, {kind: round(share["score"], 3) for kind, share in results[str(resolution)].items()})
    return results


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draws one line per kind, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    sides = [int(side) for side in results]
    for kind in next(iter(results.values())):
        shares = [100 * results[str(side)][kind]["score"] for side in sides]
        low = [share - 100 * results[str(side)][kind]["low"] for share, side in zip(shares, sides, strict=True)]
        high = [100 * results[str(side)][kind]["high"] - share for share, side in zip(shares, sides, strict=True)]
        style = {"color": "black", "linewidth": 2.5} if kind == "all" else {"linewidth": 1.3}
        axes.errorbar(sides, shares, yerr=[low, high], marker="o", markersize=4, capsize=2, label=kind, **style)
    axes.set_xticks(sides, [f"{side}\n{(side // 64) ** 2} tokens" for side in sides])
    axes.set_xlabel("resolution in pixels, visual tokens")
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model by resolution.")
    parser.add_argument("questions", type=Path, nargs="?", help="those of the first seed of evaluate.py by default")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, help="ask only a sample of this many questions")
    parser.add_argument("--record", action="store_true", help="write beside this script, not into build/")
    arguments = parser.parse_args()
    results = measure(arguments.model, arguments.questions or first_questions(), arguments.limit)
    folder = folder_of(arguments.record)
    (folder / "resolution.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, folder / "resolution.png")


if __name__ == "__main__":
    main()
