"""Measures how well `fastvlm search` finds scenes of the demo world: by words, by asking, and by both.

The scenes are drawn, so what each one shows is known. An index is made of them as the command does it, with a caption
and with the answer to "What does the text say?" for each. Then every query is put in three ways:

- **words**: looks for the query's words in these texts;
- **asking**: asks the model about each picture;
- **both**: what the command does.

Precision and recall are those of what the command shows, at its default threshold; average precision (AP) is that of
the order of all pictures. The demo model was trained to answer "Is there a red circle?", in English and Chinese, and to
read the text. It was not trained to say whether there are two crosses, or whether a certain word is there.

The seed of the scenes follows from the content of `fastvlm_mlx/album/ranking.py` and of the model, so its constants
cannot have been chosen with a look at them.

    python benchmarks/search.py --scenes 200      # a minute; the table goes to stdout
    python benchmarks/search.py --record          # 1,000 scenes; into results/ and fastvlm_mlx/album/README.md
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from recording import BUILD, write_report, write_tables

import fastvlm_mlx
from fastvlm_mlx import Engine, load
from fastvlm_mlx.album.album import THRESHOLD, Album, Hit
from fastvlm_mlx.album.asking import Asker
from fastvlm_mlx.album.updating import Updating, default_resolution
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.formatting import as_markdown
from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
from fastvlm_mlx.jobs.task import CAPTION, Task
from fastvlm_mlx.resolve import resolve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from scenes import Scene, render

PACKAGE = Path(fastvlm_mlx.__file__).parent
README = PACKAGE / "album" / "README.md"
QUESTIONS = {CAPTION: "Describe the image.", "printed": "What does the text say?"}
WAYS = ("words", "asking", "both")
CAPTION_END = " · "
"""What divides a caption from other answers about a picture."""


class Query(NamedTuple):
    """A query, and which scenes show what it says."""

    kind: str
    text: str
    holds: Callable[[Scene], bool]


def thing(colour: str | None, shape: str | None) -> Callable[[Scene], bool]:
    """Whether a scene has such a shape; None stands for any."""
    return lambda scene: any(colour in (None, each.colour) and shape in (None, each.shape) for each in scene.shapes)


def number(count: int, shape: str) -> Callable[[Scene], bool]:
    """Whether a scene has so many of a shape."""
    return lambda scene: sum(each.shape == shape for each in scene.shapes) == count


def printed(text: str) -> Callable[[Scene], bool]:
    """Whether a scene has a text."""
    return lambda scene: any(each.text == text for each in scene.texts)


def every(*conditions: Callable[[Scene], bool]) -> Callable[[Scene], bool]:
    """Whether a scene fulfils all conditions."""
    return lambda scene: all(condition(scene) for condition in conditions)


QUERIES = (
    Query("things", "a red circle", thing("red", "circle")),
    Query("things", "a blue star", thing("blue", "star")),
    Query("things", "a green square", thing("green", "square")),
    Query("things", "a yellow triangle", thing("yellow", "triangle")),
    Query("things", "white ring", thing("white", "ring")),
    Query("things", "purple cross", thing("purple", "cross")),
    Query("things", "an orange circle", thing("orange", "circle")),
    Query("things", "black squares", thing("black", "square")),
    Query("in Chinese", "红色的圆形", thing("red", "circle")),
    Query("in Chinese", "蓝色的星形", thing("blue", "star")),
    Query("in Chinese", "绿色的方形", thing("green", "square")),
    Query("in Chinese", "紫色的十字形", thing("purple", "cross")),
    Query("in Chinese", "环形", thing(None, "ring")),
    Query("in general", "a star", thing(None, "star")),
    Query("in general", "a ring", thing(None, "ring")),
    Query("in general", "something blue", thing("blue", None)),
    Query("in general", "any text", lambda scene: bool(scene.texts)),
    Query("words", "the word CAKE", printed("CAKE")),
    Query("words", "the word STOP", printed("STOP")),
    Query("words", "the word TAXI", printed("TAXI")),
    Query("words", "the word MOON", printed("MOON")),
    Query("several", "a circle and a star", every(thing(None, "circle"), thing(None, "star"))),
    Query("several", "a red shape and a ring", every(thing("red", None), thing(None, "ring"))),
    Query("counts", "two crosses", number(2, "cross")),
    Query("counts", "two stars", number(2, "star")),
    Query("counts", "three circles", number(3, "circle")),
)


class Scores(NamedTuple):
    """How well something is found."""

    precision: float
    recall: float
    average_precision: float


def score(hits: Sequence[Hit], truth: set[str], threshold: float = THRESHOLD) -> Scores:
    """The scores of hits, best first, where pictures with the names in `truth` are to be found."""
    right = np.array([hit.name in truth for hit in hits], dtype=bool)
    shown = np.array([hit.score >= threshold for hit in hits], dtype=bool)
    found = int((right & shown).sum())
    precisions = np.cumsum(right) / np.arange(1, len(right) + 1)
    return Scores(
        precision=found / int(shown.sum()) if shown.any() else 0.0,
        recall=found / len(truth),
        average_precision=float(precisions[right].sum()) / len(truth),
    )


def draw(folder: Path, seed: str, count: int) -> dict[str, Scene]:
    """Draws scenes into a folder, unless they are there; returns what they show, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = {}
    for place in range(count):
        rng = Random(f"search/{seed}/{place}")
        image, scenes[f"{place:05}.png"] = render(rng, rng.randint(240, 480), held_out=True)
        if not (file := folder / f"{place:05}.png").exists():
            image.save(file)
    return scenes


def seed_of(model: Path) -> str:
    """The seed that follows from what is measured."""
    content = (PACKAGE / "album" / "ranking.py").read_bytes() + checkpoint_fingerprint(model).encode()
    return hashlib.sha256(content).hexdigest()[:8]


def measure(model: str, count: int, seed: str | None) -> dict[str, Any]:
    """The scores of every query, with what led to them."""
    checkpoint = resolve(model)
    seed = seed or seed_of(checkpoint)
    folder = BUILD / "search" / f"{seed}-{count}"
    scenes = draw(folder, seed, count)
    network, processor = load(checkpoint)
    weights = checkpoint_fingerprint(checkpoint)
    task = Task(
        questions=QUESTIONS,
        model=model,
        weights=weights,
        dtype=str(network.dtype),
        resolution=default_resolution(processor.image_size),
        config=GenerationConfig(max_tokens=64),
    )
    queries = []
    with Album(folder, folder.with_suffix(".sqlite")) as album, Engine(network, processor) as engine:
        updating = Updating(album, task)
        for _ in updating.run(updating.plan(), lambda: engine):
            pass
        asker = Asker(network, processor, updating.form)
        for query in QUERIES:
            truth = {name for name, scene in scenes.items() if query.holds(scene)}
            *_, by_words = album.search(query.text, None, threshold=0)
            *_, by_both = album.search(query.text, asker, threshold=0)
            asked = [hit for hit in by_both.hits if hit.probability is not None]
            by_asking = sorted(asked, key=lambda hit: -(hit.probability or 0))
            ways = {
                "words": score(by_words.hits, truth),
                "asking": score([_scored(hit) for hit in by_asking], truth),
                "both": score(by_both.hits, truth),
            }
            queries.append(
                {
                    "kind": query.kind,
                    "query": query.text,
                    "right": len(truth),
                    **{way: scores._asdict() for way, scores in ways.items()},
                }
            )
        alike = alikeness(album, updating.form, scenes)
    return {"model": model, "weights": weights, "scenes": count, "seed": seed, "queries": queries, "alike": alike}


def alikeness(album: Album, form: str, scenes: dict[str, Scene]) -> dict[str, float]:
    """How many of the ten pictures that are nearest to a picture share a thing, a shape of one colour, with it.

    Pictures are near by the mean and the spread of their visual tokens, or by the things that their captions name.
    """
    contents = {number: content for number, content in album.index.candidates(form) if content is not None}
    details = album.index.details(list(contents))
    tokens = album.index.visual_tokens(list(contents.values()), form)
    things = [{each.name for each in scenes[details[number].path].shapes} for number in contents]
    captions = [details[number].caption.partition(CAPTION_END)[0].lower().rstrip(".") for number in contents]
    named = [set(caption.replace(" and ", ", ").replace("an ", "a ").split(", ")) for caption in captions]
    shown = np.stack([tokens[content].astype(np.float32) for content in contents.values()])
    pooled = np.concatenate([shown.mean(axis=1), shown.std(axis=1)], axis=1)
    pooled -= pooled.mean(axis=0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    right = np.array([[bool(first & second) for second in things] for first in things])
    nearness = {
        "visual tokens": pooled @ pooled.T,
        "captions": np.array([[len(first & second) / len(first | second) for second in named] for first in named]),
    }
    np.fill_diagonal(right, False)
    precisions = {"chance": float(right.mean())}
    for way, near in nearness.items():
        np.fill_diagonal(near, -np.inf)
        best = np.argsort(-near, axis=1, kind="stable")[:, :10]
        precisions[way] = float(np.take_along_axis(right, best, axis=1).mean())
    return precisions


def _scored(hit: Hit) -> Hit:
    """A hit as if nothing but asking had found it."""
    return replace(hit, score=hit.probability or 0.0)


def table(values: dict[str, Any]) -> Iterable[str]:
    """The lines of a report: a row for each query, and the means of each kind and of all."""
    rows = [["query", "right", *(f"{way} P / R / AP" for way in WAYS)]]
    kinds = list(dict.fromkeys(query["kind"] for query in values["queries"]))
    for kind in kinds:
        members = [query for query in values["queries"] if query["kind"] == kind]
        rows += [[query["query"], str(query["right"]), *(_shown([query], way) for way in WAYS)] for query in members]
        rows.append([f"**{kind}**, mean", "", *(f"**{_shown(members, way)}**" for way in WAYS)])
    rows.append(["**all**, mean", "", *(f"**{_shown(values['queries'], way)}**" for way in WAYS)])
    yield f"{values['scenes']} scenes, {len(values['queries'])} queries, the demo model at its own resolution:"
    yield ""
    yield as_markdown(rows)
    yield ""
    shares = ", ".join(f"{way} {share:.2f}" for way, share in values["alike"].items())
    yield f"Of the ten pictures nearest to each, the share that has a shape of one colour in common with it: {shares}."


def _shown(queries: Sequence[dict[str, Any]], way: str) -> str:
    return " / ".join(f"{np.mean([query[way][name] for query in queries]):.2f}" for name in Scores._fields)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Measure how well search finds scenes of the demo world.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", help="draw other scenes than those that follow from what is measured")
    parser.add_argument("--record", action="store_true", help="into results/ and fastvlm_mlx/album/README.md")
    arguments = parser.parse_args()
    values = measure(arguments.model, arguments.scenes, arguments.seed)
    file = write_report("search", values, arguments.model, record=arguments.record)
    print("\n".join(table(values)))
    print(f"\nwritten to {file}", file=sys.stderr)
    if arguments.record:
        write_tables("search", table, README)


if __name__ == "__main__":
    main()
