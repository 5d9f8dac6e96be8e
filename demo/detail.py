"""Measures and plots what `--resolution auto --detail N` gains: accuracy over visual tokens.

    python demo/detail.py

Two worlds, because a fixed resolution is best where all pictures are alike: the demo's own scenes, and scenes from its
own distance to one where everything is 0.6 times as large. Fonts and backgrounds are held out, and the seed is the
second one of `evaluate.py`. The measure and `DETAIL` were chosen on scenes of the training kind, of other seeds. `auto`
chooses between the resolutions that the model was trained at, 192 and 256 pixels; 128 and 320 are shown beside them.
Writes `detail.json` and `detail.png` into `build/`, or with `--record` beside this file; answers are kept in
`build/detail/`, so that the measure can be changed without asking again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
from evaluate import BUILD, QUESTIONS, Z95, folder_of, interval, seeds_of, shipped_digest
from PIL import Image
from scenes import KINDS, ask, render

from fastvlm_mlx import load
from fastvlm_mlx.inputs.detail import Details
from fastvlm_mlx.inputs.turned import TurnedImage
from fastvlm_mlx.jobs.evaluate import evaluate
from fastvlm_mlx.jobs.questions import read_questions

WORLDS = {"own": (1.0, 1.0), "further": (0.6, 1.0)}
"""The smallest and the largest zoom; its logarithm is spread evenly between them."""
FIXED = (128, 192, 256, 320)
TRAINED = (192, 256)
LOWEST = 80
"""Per cent at which the axes begin."""
DETAIL = 8.0
DETAILS = (5.0, 6.0, 7.0, DETAIL, 9.0, 10.0, 12.0)

Row = dict[str, Any]


def draw(world: str, seed: int, count: int, folder: Path) -> list[Row]:
    """Draws scenes into `folder` with a question about each; returns {"image", "question", "answers", "kind"}."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    low, high = (math.log(zoom) for zoom in WORLDS[world])
    rows = []
    for index in range(count):
        rng = Random(f"{world}/{seed}/{index}")
        zoom = math.exp(rng.uniform(low, high))
        while True:
            image, scene = render(rng, rng.randint(240, 480), held_out=True, zoom=zoom)
            question = ask(scene, rng, KINDS[index % len(KINDS)])
            if question is not None:
                break
        name = f"images/{index:05}.png"
        image.save(folder / name)
        rows.append({"image": name, "question": question.question, "answers": [question.answer], "kind": question.kind})
    return rows


def answer(model: str, world: str, seed: int, count: int) -> tuple[Path, list[dict[str, float]]]:
    """Returns the folder of a world and, for each of its questions, the score at each resolution."""
    folder = BUILD / "detail" / f"{world.replace(' ', '-')}-{seed}-{count}"
    kept = folder / "scores.json"
    if not kept.exists():
        rows = draw(world, seed, count, folder)
        questions = folder / "questions.jsonl"
        questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        loaded, processor = load(model)
        scores: list[dict[str, float]] = [{} for _ in rows]
        for side in FIXED:
            report = evaluate(loaded, processor, read_questions(questions), resolution=side)
            for score, given in zip(scores, report.answers, strict=True):
                score[str(side)] = given.score
        kept.write_text(json.dumps(scores))
    return folder, json.loads(kept.read_text())


def spacings(folder: Path, count: int) -> list[dict[int, float]]:
    """Returns the spacing of each picture's details at the resolutions that it may get."""
    found = []
    for index in range(count):
        with Image.open(folder / "images" / f"{index:05}.png") as image:
            details = Details(TurnedImage(image.convert("RGB")), TRAINED[-1])
        found.append({side: details.spacing(side) for side in TRAINED[:-1]})
    return found


def choose(spacing: dict[int, float], detail: float) -> int:
    """Returns the resolution that a picture gets."""
    return next((side for side, pixels in spacing.items() if pixels >= detail), TRAINED[-1])


def share(scores: list[dict[str, float]], chosen: list[int]) -> Row:
    """Returns the accuracy with its 95 % interval, and the visual tokens of a picture on average."""
    right = sum(score[str(side)] for score, side in zip(scores, chosen, strict=True))
    low, high = interval(round(right), len(scores))
    tokens = sum((side // 64) ** 2 for side in chosen) / len(chosen)
    return {"score": right / len(scores), "low": low, "high": high, "tokens": tokens}


def difference(scores: list[dict[str, float]], chosen: list[int], side: int) -> Row:
    """Returns how much more is right than at one fixed resolution, on the same questions, with its 95 % interval."""
    gains = [score[str(own)] - score[str(side)] for score, own in zip(scores, chosen, strict=True)]
    mean = sum(gains) / len(gains)
    half = Z95 * math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
    return {"from": side, "difference": mean, "low": mean - half, "high": mean + half}


def measure(model: str, count: int) -> dict[str, Any]:
    """Returns what fixed resolutions and `auto` give in each world."""
    seed = seeds_of(shipped_digest())[1]
    worlds = {}
    for world, zoom in WORLDS.items():
        folder, scores = answer(model, world, seed, count)
        fixed = {str(side): share(scores, [side] * count) for side in FIXED}
        pictures = spacings(folder, count)
        chosen = {detail: [choose(picture, detail) for picture in pictures] for detail in DETAILS}
        auto = {f"{detail:g}": share(scores, sides) for detail, sides in chosen.items()}
        worlds[world] = {
            "zoom": zoom,
            "fixed": fixed,
            "auto": auto,
            "differences": [difference(scores, chosen[DETAIL], side) for side in TRAINED],
        }
        for name, row in {**fixed, **{f"auto:{detail}": row for detail, row in auto.items()}}.items():
            print(f"{world:14}{name:>10}{100 * row['score']:7.1f} %{row['tokens']:7.1f} tokens")
        print(worlds[world]["differences"])
    return {"seed": seed, "questions": count, "detail": DETAIL, "worlds": worlds}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws accuracy over visual tokens, one panel for each world."""
    figure, panels = plt.subplots(1, len(result["worlds"]), figsize=(9, 4), layout="constrained", sharey=True)
    for axes, (world, values) in zip(panels, result["worlds"].items(), strict=True):
        for label, rows, style in (
            ("fixed", values["fixed"], {"color": "#888888", "marker": "s", "markersize": 5}),
            ("auto", values["auto"], {"color": "#c2410c", "marker": "o", "markersize": 3, "linewidth": 1.2}),
            (f"auto:{DETAIL:g}", {"": values["auto"][f"{DETAIL:g}"]}, {"color": "#c2410c", "marker": "o"}),
        ):
            tokens, middle, low, high = (
                [row[name] * (1 if name == "tokens" else 100) for row in rows.values()]
                for name in ("tokens", "score", "low", "high")
            )
            bars = [
                [a - b for a, b in zip(middle, low, strict=True)],
                [b - a for a, b in zip(middle, high, strict=True)],
            ]
            axes.errorbar(tokens, middle, yerr=None if label == "auto" else bars, capsize=2, label=label, **style)
        for side, row in values["fixed"].items():
            share, label, above = 100 * row["score"], f"{side} px", -12
            if share < LOWEST:
                share, label, above = LOWEST, f"{label}: {share:.0f} %", 4
            axes.annotate(label, (row["tokens"], share), (4, above), textcoords="offset points")
        axes.set_ylim(LOWEST, 100.5)
        low, high = values["zoom"]
        axes.set_title(f"{world}: zoom {low:g}" + (f" to {high:g}" if low != high else ""))
        axes.set_xlabel("visual tokens of a picture on average")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact answers, %")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Accuracy over visual tokens, of auto and of fixed resolutions.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=QUESTIONS, help="questions of each world")
    parser.add_argument("--record", action="store_true", help="write beside this script, not into build/")
    arguments = parser.parse_args()
    folder = folder_of(arguments.record)
    result = measure(arguments.model, arguments.count)
    (folder / "detail.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, folder / "detail.png")


if __name__ == "__main__":
    main()
