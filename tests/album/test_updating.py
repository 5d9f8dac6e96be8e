"""The index of an album, brought up to date."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import ConfigError
from fastvlm_mlx.album import plan
from fastvlm_mlx.album.album import Album
from fastvlm_mlx.album.captions import read_journals
from fastvlm_mlx.album.updating import Updating, form_of, known_pictures
from fastvlm_mlx.jobs.pictures import Pictures, Skipped
from tests.album.conftest import NAMES, TOKENS_ONLY, task
from tests.checkpoints import APPLE

FORM = form_of("w", 128)


def names(album) -> set[str]:
    numbers = [number for number, _ in album.index.candidates(FORM)]
    return {each.path for each in album.index.details(numbers).values()}


def shown(album) -> dict[str, np.ndarray]:
    """The visual tokens by name."""
    candidates = {number: content for number, content in album.index.candidates(FORM) if content is not None}
    tokens = album.index.visual_tokens(list(candidates.values()), FORM)
    details = album.index.details(list(candidates))
    return {details[number].path: tokens[content] for number, content in candidates.items() if content in tokens}


@pytest.mark.parametrize("asked", [TOKENS_ONLY, task(), task(questions={"text": "What?", "more": "What else?"})])
def test_the_tower_sees_a_picture_once_for_all_that_the_index_keeps(album, update, tower, loaded, asked):
    steps = update(asked)
    assert [(step.name, step.error, step.shown) for step in steps] == [(name, None, True) for name in NAMES]
    assert tower.seen == 3
    model, processor = loaded
    pixels = processor.prepare_images([APPLE / "images" / name for name in NAMES], 128)
    for tokens, expected in zip(shown(album).values(), np.array(model.encode_image(pixels)), strict=True):
        assert tokens.dtype == np.float16
        # Half precision keeps 11 bits; the tower may see one image or several at once.
        np.testing.assert_allclose(tokens, expected, rtol=2**-11, atol=1e-4)
    (content, *_) = [content for _, content in album.index.candidates(FORM)]
    assert set(album.index.texts(content)) == set(asked.questions)


def test_a_second_run_does_nothing(album, update, tower):
    update(task())
    assert Updating(album, task()).plan().unchanged == 3
    assert update(task()) == []
    assert tower.seen == 3


def test_moved_files_and_copies_are_known_by_their_content(album, update, tower, photos):
    update(task())
    (photos / "sub").mkdir()
    (photos / "square.png").rename(photos / "sub" / "moved.png")
    shutil.copy(photos / "portrait.png", photos / "copy.png")
    steps = update(task())
    assert {step.name: step.shown for step in steps} == {"copy.png": False, "sub/moved.png": False}
    assert tower.seen == 3
    assert names(album) == {"landscape.png", "portrait.png", "copy.png", "sub/moved.png"}
    assert len(shown(album)) == 4


def test_changed_files_are_seen_again_and_deleted_ones_leave(album, update, tower, photos):
    update()
    Image.new("RGB", (50, 40), "red").save(photos / "square.png")
    (photos / "portrait.png").unlink()
    assert [step.name for step in update()] == ["square.png"]
    assert tower.seen == 4
    assert names(album) == {"landscape.png", "square.png"}
    numbers = [number for number, _ in album.index.candidates(FORM)]
    assert (50, 40) in [each.size for each in album.index.details(numbers).values()]


def test_pictures_that_come_back_need_nothing(album, update, tower, photos):
    update()
    away = photos.parent / "away.png"
    (photos / "square.png").rename(away)
    update()
    assert len(names(album)) == 2
    away.rename(photos / "square.png")
    update()
    assert len(names(album)) == 3
    assert tower.seen == 3


def test_what_is_gone_for_a_month_is_forgotten(album, update, photos):
    update(task())
    (photos / "square.png").unlink()
    update(task())
    assert len(album.index.pictures()) == 3
    album.index.all("UPDATE pictures SET gone = gone - 31 * 86400")
    update(task())
    assert len(album.index.pictures()) == 2
    assert len(album.index.described(FORM, ["text"], ["w"])) == 2


@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "no folder"])
def test_a_folder_that_vanishes_takes_nothing_from_the_index(album, update, tower, photos, empty):
    update()
    photos.rename(photos.with_name("elsewhere"))
    if empty:
        photos.mkdir()
    plan = Updating(album, TOKENS_ONLY).plan()
    assert plan.vanished
    assert update() == []
    assert known_pictures(album.index) == len(names(album)) == 3
    if empty:
        photos.rmdir()
    photos.with_name("elsewhere").rename(photos)
    assert update() == []
    assert tower.seen == 3


def test_a_folder_that_cannot_be_read_now_keeps_its_place(album, update, photos, monkeypatch):
    (photos / "sub").mkdir()
    (photos / "square.png").rename(photos / "sub" / "square.png")
    update()
    found = plan.find_pictures([str(photos)])
    closed = Skipped(str(photos / "sub"), "Permission denied")
    less = Pictures(found=found.found[:2], unreadable=[closed])
    monkeypatch.setattr(plan, "find_pictures", lambda _: less)
    assert Updating(album, TOKENS_ONLY).plan().unreadable == [closed]
    update()
    assert "sub/square.png" in names(album)


@pytest.mark.parametrize("asked", [TOKENS_ONLY, task()])
def test_an_unreadable_picture_has_a_reason_and_is_left_alone_until_it_changes(album, update, photos, asked):
    (photos / "broken.png").write_bytes((photos / "square.png").read_bytes()[:90])
    (photos / "copy.png").write_bytes((photos / "broken.png").read_bytes())
    steps = {step.name: step.error for step in update(asked)}
    assert "broken.png" in steps["broken.png"]
    assert "copy.png" in steps["copy.png"]
    assert {name for name, error in steps.items() if error is None} == set(NAMES)
    assert update(asked) == []
    assert Updating(album, asked).plan().failed == 2
    assert {step.name for step in update(asked, retry_errors=True)} == {"broken.png", "copy.png"}
    shutil.copy(photos / "square.png", photos / "broken.png")
    assert [(step.name, step.error) for step in update(asked)] == [("broken.png", None)]


def test_an_interrupted_run_has_lost_nothing(album, tower):
    first = Updating(album, task())
    steps = first.run(first.plan(), tower)
    assert next(steps).name == "landscape.png"
    steps.close()
    assert [picture.name for picture in Updating(album, task()).plan().todo] == ["portrait.png", "square.png"]


@pytest.mark.parametrize("other", [task("other"), task(resolution=192)], ids=["weights", "resolution"])
def test_visual_tokens_of_another_form_are_replaced_one_by_one(album, update, tower, other):
    update(task())
    first = Updating(album, other)
    steps = first.run(first.plan(), tower)
    next(steps)
    steps.close()
    assert album.index.forms() == {FORM: 2, first.form: 1}
    update(other)
    assert album.index.forms() == {first.form: 3}


def test_captions_come_from_journals_without_being_asked_for(album, update, tower, photos, tmp_path):
    lines = [
        {
            "fingerprint": name,
            "file": name,
            "text": f"a caption of {name} \ud800",
            "answers": {"printed": "STOP"},
            "sha256": hashlib.sha256((photos / name).read_bytes()).hexdigest(),
        }
        for name in NAMES
    ]
    lines.append({"fingerprint": "5", "file": "x", "text": 5, "sha256": 7, "answers": []})
    journal = tmp_path / "captions.jsonl"
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    texts = read_journals([journal])
    submit = tower.engine.submit
    tower.engine.submit = None  # nothing may be asked
    assert len(update(task(), texts)) == 3
    assert tower.seen == 3
    (hit,) = next(album.search("square stop")).hits[:1]
    assert hit.name == "square.png"
    assert hit.caption == "a caption of square.png ? · STOP"
    tower.engine.submit = submit
    assert update(task()) == []


def test_journals_reach_pictures_that_were_indexed_before(album, update, photos, tmp_path):
    update()
    sha256 = hashlib.sha256((photos / "square.png").read_bytes()).hexdigest()
    assert update(TOKENS_ONLY, {sha256: {"text": "a lighthouse"}}) == []
    assert [hit.name for hit in next(album.search("lighthouses")).hits] == ["square.png"]


def test_a_journal_that_is_none_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match=r"notes\.txt: holds no records"):
        read_journals([path])
    with pytest.raises(ConfigError, match=r"missing\.jsonl: cannot be read as captions"):
        read_journals([Path(tmp_path, "missing.jsonl")])


def test_only_one_run_at_a_time_brings_an_index_up_to_date(album, photos):
    with album.index.updating() as alone, Album(photos) as second:
        assert alone
        with second.index.updating() as also:
            assert not also
    with album.index.updating() as again:
        assert again


def test_nothing_is_written_into_the_folder(album, update, photos):
    before = {path.name: path.stat().st_mtime_ns for path in [photos, *photos.iterdir()]}
    update(task())
    assert {path.name: path.stat().st_mtime_ns for path in [photos, *photos.iterdir()]} == before
