"""Searches of an album."""

import io
import itertools
import threading

import pytest
from PIL import Image

from fastvlm_mlx import ImageError, PromptError
from fastvlm_mlx.album import album as module
from fastvlm_mlx.album.asking import Asker
from fastvlm_mlx.album.updating import form_of
from tests.album.conftest import NAMES, task

FORM = form_of("w", 128)


@pytest.fixture
def asker(album, update, tower, loaded):
    update(task())
    tower.seen = 0
    return Asker(*loaded, FORM, batch=1)


def test_asking_needs_no_tower_and_asks_about_every_picture(album, asker, tower):
    *_, last = album.search("a cat", asker, threshold=0)
    assert tower.seen == 0
    assert (last.asked, last.total, last.done) == (3, 3, True)
    assert {hit.name for hit in last.hits} == set(NAMES)
    assert [hit.score for hit in last.hits] == sorted((hit.score for hit in last.hits), reverse=True)
    assert all(hit.path == f"{album.folder}/{hit.name}" for hit in last.hits)


def test_what_words_find_comes_at_once_and_is_asked_about_first(album, asker, monkeypatch):
    monkeypatch.setattr(module, "_EVERY", 0)
    monkeypatch.setattr(module, "_FIRST_BATCH", 1)
    results = list(album.search("square", asker, threshold=0))
    assert [hit.name for hit in results[0].hits] == ["square.png"]
    assert (results[0].asked, results[0].done) == (0, False)
    asked = [hit.name for hit in results[1].hits if hit.probability is not None]
    assert asked == ["square.png"]
    assert [each.asked for each in results] == [0, 1, 2, 3]


def test_without_a_model_words_alone_find_pictures(album, asker):
    (only,) = album.search("portrait")
    assert [(hit.name, hit.probability, hit.words) for hit in only.hits] == [("portrait.png", None, 1.0)]
    assert only.done


def test_a_search_ends_after_the_seconds_it_has(album, asker):
    *_, last = album.search("a cat", asker, seconds=0)
    assert not last.done
    assert last.asked < last.total


def test_a_search_ends_early_without_harm(album, asker):
    search = album.search("a cat", asker)
    next(search)
    search.close()
    assert [*album.search("a cat", asker)][-1].done


def test_hits_are_bounded_in_number_score_and_date(album, asker, photos):
    *_, every = album.search("a cat", asker, threshold=0)
    *_, best = album.search("a cat", asker, threshold=0, top=1)
    assert best.hits == every.hits[:1]
    assert best.found == 3
    between = (every.hits[0].score + every.hits[1].score) / 2
    *_, likely = album.search("a cat", asker, threshold=between)
    assert [hit.name for hit in likely.hits] == [every.hits[0].name]
    assert not next(album.search("square", since="2999")).hits
    assert next(album.search("square", since="1970-01-01")).hits


def test_copies_are_asked_about_once(album, update, asker, photos, monkeypatch):
    (photos / "copy.png").write_bytes((photos / "square.png").read_bytes())
    update(task())
    *_, last = album.search("a cat", asker, threshold=0)
    scores = {hit.name: hit.probability for hit in last.hits}
    assert scores["copy.png"] == scores["square.png"]
    assert last.asked == 4


def test_the_order_of_batches_changes_no_probability(album, asker, loaded):
    *_, one = album.search("a cat", asker, threshold=0)
    *_, all_at_once = album.search("a cat", Asker(*loaded, FORM, batch=8), threshold=0)
    first = {hit.name: hit.probability for hit in one.hits}
    assert {hit.name: hit.probability for hit in all_at_once.hits} == pytest.approx(first, abs=1e-5)


def test_an_index_of_other_weights_has_nothing_to_ask_about(album, asker, loaded):
    (only,) = album.search("square", Asker(*loaded, form_of("other", 128)))
    assert (only.total, [hit.name for hit in only.hits]) == (0, ["square.png"])


def test_an_empty_query_is_refused(album):
    with pytest.raises(PromptError, match="the query is empty"):
        next(album.search(" "))


def test_several_threads_search_at_once(album, asker):
    expected = [hit.name for hit in [*album.search("a cat", asker, threshold=0)][-1].hits]
    found = []

    def search() -> None:
        found.append([hit.name for hit in [*album.search("a cat", asker, threshold=0)][-1].hits])

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == list(itertools.repeat(expected, 3))


def test_a_thumbnail_is_a_small_jpeg(album, asker):
    (hit,) = next(album.search("landscape")).hits
    with Image.open(io.BytesIO(album.thumbnail(hit.id, 32))) as image:
        assert image.format == "JPEG"
        assert max(image.size) == 32
    with pytest.raises(ImageError, match="picture 99 is not in"):
        album.thumbnail(99)
