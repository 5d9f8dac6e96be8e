"""The scores and the table of `benchmarks/search.py`; what it measures takes minutes."""

import sys
from pathlib import Path

import pytest

from fastvlm_mlx.album.album import Hit

pytest.importorskip("matplotlib", reason="demo/scenes.py takes its fonts from matplotlib")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import search

    yield search
    for name in ("search", "recording", "peers", "scenes"):
        sys.modules.pop(name, None)


def hits(**scores: float) -> list[Hit]:
    known = {"id": 0, "path": "", "probability": None, "words": 0.0, "caption": "", "date": "", "size": None}
    return [Hit(name=name, score=score, **known) for name, score in scores.items()]


def test_scores_are_those_of_what_is_shown_and_of_the_order(search) -> None:
    found = search.score(hits(a=0.9, b=0.8, c=0.6, d=0.1), {"a", "c", "d", "e"})
    assert found == pytest.approx((2 / 3, 2 / 4, (1 + 2 / 3 + 3 / 4) / 4))
    assert search.score([], {"a"}) == (0, 0, 0)


def test_queries_are_true_of_the_scenes_that_show_what_they_say(search) -> None:
    import scenes

    def shape(colour: str, kind: str):
        return scenes.Shape(shape=kind, colour=colour, size="small", x=0.0, y=0.0, radius=1.0)

    shapes = (shape("red", "circle"), shape("blue", "star"), shape("green", "star"))
    texts = (scenes.Text(text="CAKE", box=(0, 0, 1, 1), centres=()),)
    scene = scenes.Scene(width=9, height=9, shapes=shapes, texts=texts)
    assert {query.text for query in search.QUERIES if query.holds(scene)} == {
        *("a red circle", "a blue star", "红色的圆形", "蓝色的星形", "a star", "something blue"),
        *("any text", "the word CAKE", "a circle and a star", "two stars"),
    }


def test_the_table_has_a_row_for_each_query_and_the_means(search) -> None:
    query = {way: {"precision": 1.0, "recall": 0.5, "average_precision": 0.25} for way in search.WAYS}
    queries = [{"kind": kind, "query": text, "right": 3, **query} for kind, text in (("k", "q"), ("l", "r"))]
    values = {"scenes": 10, "queries": queries, "alike": {"chance": 0.1, "captions": 0.9}}
    text = "\n".join(search.table(values))
    assert text.count("1.00 / 0.50 / 0.25") == 3 * 5
    assert "| q | 3 |" in text
    assert "chance 0.10, captions 0.90" in text
