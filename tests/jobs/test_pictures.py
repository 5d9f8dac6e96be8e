import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.pictures import Pictures, find_pictures, natural_key, read_names

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes empty files, and the folders around them, in a folder that it returns."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def names(pictures: Pictures) -> list[str]:
    return [picture.name for picture in pictures.found]


def reasons(pictures: Pictures) -> dict[str, str]:
    return {os.path.basename(path): reason for path, reason in pictures.skipped}


def test_a_folder_is_searched_with_all_that_is_in_it_in_natural_order(make: Make) -> None:
    folder = make("b.jpg", "A10.PNG", "a2.webp", "2024/1.heic", "2024/trip/x.tif", "10.jpg", "9.jpg")
    pictures = find_pictures([str(folder)])
    assert names(pictures) == ["9.jpg", "10.jpg", "2024/1.heic", "2024/trip/x.tif", "a2.webp", "A10.PNG", "b.jpg"]
    assert {picture.root for picture in pictures.found} == {str(folder)}
    assert not pictures.skipped
    assert not pictures.unreadable


def test_natural_order_is_that_of_people() -> None:
    ordered = ["IMG_2", "img_10", "IMG_010", "IMG_11", "x1y2", "x1y10", "x²", "Ö"]
    assert sorted(reversed(ordered), key=natural_key)[:1] == ["IMG_2"]
    assert sorted(ordered, key=natural_key)[3:] == ["IMG_11", "x1y2", "x1y10", "x²", "Ö"]


def test_hidden_files_and_what_servers_add_are_left_out(make: Make) -> None:
    folder = make("a.jpg", "._a.jpg", ".b.jpg", ".git/c.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._a.jpg")
    pictures = find_pictures([str(folder)])
    assert (names(pictures), pictures.skipped) == (["a.jpg"], [])
    assert names(find_pictures([str(folder / ".git")])) == ["c.jpg"]  # who names it means it


def test_what_is_no_picture_is_named_with_a_reason(make: Make) -> None:
    folder = make("a.jpg", "a.txt", "a.jpg.xmp", "metadata.jsonl", "note.txt", "clip.mov", "raw.DNG", "empty")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "bmw.txt").write_text("BMW and P1 are names")
    assert reasons(found := find_pictures([str(folder)])) == {
        "note.txt": "not a picture",
        "bmw.txt": "not a picture",
        "clip.mov": "not a picture",
        "empty": "not a picture",
        "pipe.jpg": "neither a file nor a folder",
        "raw.DNG": "a camera's raw file; develop it to JPEG first",
    }
    assert names(found) == ["a.jpg"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_a_picture_without_its_extension_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "download", kind)
    assert names(find_pictures([str(tmp_path)])) == ["download"]


def test_a_live_photo_counts_once(make: Make) -> None:
    folder = make("IMG_1.HEIC", "IMG_1.MOV", "IMG_2.jpg", "img_2.mp4", "IMG_3.mov", "a.png", "a.mov")
    pictures = find_pictures([str(folder)])
    assert names(pictures) == ["a.png", "IMG_1.HEIC", "IMG_2.jpg"]
    assert reasons(pictures) == {
        "IMG_1.MOV": "film of the Live Photo IMG_1.HEIC",
        "img_2.mp4": "film of the Live Photo IMG_2.jpg",
        "IMG_3.mov": "not a picture",
        "a.mov": "not a picture",
    }
    named = find_pictures([str(folder / "IMG_1.MOV"), str(folder / "IMG_1.HEIC")])
    assert (names(named), reasons(named)) == (["IMG_1.HEIC"], {"IMG_1.MOV": "film of the Live Photo IMG_1.HEIC"})


def test_of_a_photos_library_the_originals_are_read_and_nothing_is_written(make: Make) -> None:
    originals = "Trip.photoslibrary/originals/A"
    folder = make(
        f"{originals}/A1.heic",
        f"{originals}/A1_3.mov",
        "Trip.photoslibrary/resources/derivatives/A1_105_c.jpeg",
        "b.jpg",
    )
    pictures = find_pictures([str(folder)])
    assert [(picture.name, picture.read_only) for picture in pictures.found] == [
        ("b.jpg", False),
        (f"{originals}/A1.heic", True),
    ]
    assert reasons(pictures) == {"A1_3.mov": "film of the Live Photo A1.heic"}
    (folder / "link").symlink_to(folder / originals)
    assert [picture.read_only for picture in find_pictures([str(folder)]).found] == [False, True]
    (folder / "other").mkdir()
    (folder / "other" / "link").symlink_to(folder / originals)
    assert [picture.read_only for picture in find_pictures([str(folder / "other")]).found] == [True]
    for name in (folder / "link", folder / originals, folder / originals / "A1.heic", folder / "link" / "A1.heic"):
        assert [picture.read_only for picture in find_pictures([str(name)]).found] == [True]


def test_links_are_followed_and_loops_end(make: Make) -> None:
    folder = make("z/a.jpg", "z/deep/b.jpg")
    (folder / "a_link").symlink_to(folder / "z")
    (folder / "z" / "deep" / "up").symlink_to(folder)
    (folder / "c.jpg").symlink_to(folder / "z" / "a.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "self").symlink_to(folder / "self")
    pictures = find_pictures([str(folder)])
    assert names(pictures) == ["c.jpg", "z/a.jpg", "z/deep/b.jpg"]
    assert reasons(pictures) == dict.fromkeys(("a_link", "up"), "another name of a folder that was searched")
    assert {os.path.basename(path): reason for path, reason in pictures.unreadable} == {
        "gone.jpg": "a link to nothing",
        "self": "a link to nothing",
    }
    elsewhere = make("outside/d.jpg") / "outside"
    (folder / "z" / "out").symlink_to(elsewhere)
    assert names(find_pictures([str(folder / "z")])) == [
        "a.jpg",
        "deep/b.jpg",
        "deep/up/c.jpg",
        "deep/up/outside/d.jpg",
    ]


def test_a_name_that_is_not_utf8_is_kept_to_the_byte(make: Make) -> None:
    folder = make("a.jpg")
    raw = os.fsencode(folder) + b"/caf\xe9.jpg"
    try:
        with open(raw, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    pictures = find_pictures([str(folder)])
    assert [os.fsencode(picture.path) for picture in pictures.found] == [os.fsencode(folder / "a.jpg"), raw]
    assert names(find_pictures(read_names(raw, "list"))) == ["caf\udce9.jpg"]


def test_patterns_and_names_that_look_like_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("a1.jpg", "a10.jpg", "a2.jpg", "b[1].jpg", "deep/er/c.jpg", "note.txt")
    monkeypatch.chdir(folder)
    assert names(find_pictures(["a*.jpg"])) == ["a1.jpg", "a2.jpg", "a10.jpg"]
    for pattern in ("**/c.jpg", "**/e?/*.jpg", "**/er", "d*/**", "deep/**/er/**/c.jpg", f"{folder}/**/[ch]*.jpg"):
        assert [os.path.basename(name) for name in names(find_pictures([pattern]))] == ["c.jpg"], pattern
    assert names(find_pictures(["d*"])) == ["er/c.jpg"]
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "deep" / "er" / "up").symlink_to(folder)
    assert names(find_pictures(["**/*.jpg"])) == ["a1.jpg", "a2.jpg", "a10.jpg", "b[1].jpg", "deep/er/c.jpg"]
    assert len(find_pictures(["**/a1.jpg", "**/a2.jpg", ".", str(folder / "deep" / "up")]).found) == 5
    assert find_pictures(["**/*.gif", "no/**"]).unreadable == [
        ("**/*.gif", "no file matches this pattern"),
        ("no/**", "no file matches this pattern"),
    ]
    assert names(find_pictures(["b[1].jpg"])) == ["b[1].jpg"]
    pictures = find_pictures(["*.gif", "missing.jpg", "note.txt"])
    assert pictures.unreadable == [("*.gif", "no file matches this pattern"), ("missing.jpg", "no such file")]
    assert pictures.skipped == [("note.txt", "not a picture")]


def test_include_and_exclude_take_names_and_paths(make: Make) -> None:
    folder = str(make("a.jpg", "a.png", "thumbs/b.jpg", "2024/c.JPG", "2024/raw/d.jpg"))
    assert names(find_pictures([folder], include=["*.jpg"])) == [
        "2024/c.JPG",
        "2024/raw/d.jpg",
        "a.jpg",
        "thumbs/b.jpg",
    ]
    assert names(find_pictures([folder], exclude=["thumbs", "2024/raw"])) == ["2024/c.JPG", "a.jpg", "a.png"]
    assert names(find_pictures([folder], include=["2024/*"], exclude=["d.*"])) == ["2024/c.JPG"]
    assert names(find_pictures([f"{folder}/a.jpg"], exclude=["*.jpg"])) == []


def test_each_picture_counts_once_however_often_it_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("a.jpg", "deep/b.jpg")
    monkeypatch.chdir(folder)
    url = "https://a.example/x.jpg"
    pictures = find_pictures(["a.jpg", "./a.jpg", str(folder / "a.jpg"), ".", "deep", "deep/b.jpg", url, url])
    assert [picture.path for picture in pictures.found] == ["a.jpg", "./deep/b.jpg", url]
    assert (pictures.found[2].read_only, pictures.found[2].name) == (True, url)


def test_a_folder_that_may_not_be_read_is_named_and_the_others_are_searched(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scandir = make("a/1.jpg", "b/2.jpg"), os.scandir

    def refusing(path: str) -> object:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    pictures = find_pictures([str(folder)])
    assert names(pictures) == ["b/2.jpg"]
    assert pictures.unreadable == [(str(folder / "a"), "Permission denied")]


def test_folders_may_be_deeper_than_python_nests_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("a.jpg").touch()
    os.chdir(tmp_path)
    try:
        (picture,) = find_pictures(["d"]).found
        assert picture.path == "d/" * 1200 + "a.jpg"
    finally:  # pytest could not remove so many
        os.remove("d/" * 1200 + "a.jpg")
        for depth in range(1200, 0, -1):
            os.rmdir("d/" * depth)


def test_lists_of_names_end_lines_as_the_program_that_wrote_them() -> None:
    assert read_names(b"\xef\xbb\xbfa.jpg\r\n\r\nb c.jpg", "list") == ["a.jpg", "b c.jpg"]
    assert read_names(b"a\nb.jpg\0c.jpg\0", "list") == ["a\nb.jpg", "c.jpg"]
    assert read_names("ä\u2028.jpg\n".encode(), "list") == ["ä\u2028.jpg"]
    with pytest.raises(ConfigError, match=r"list\.txt: names no files; expected one on each line"):
        read_names(b"\n\n", "list.txt")


def test_a_picture_takes_less_than_two_kilobytes_and_a_twentieth_of_a_millisecond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that 100,000 take less than 200 MB and 5 s."""
    count = 1500
    for number in range(count):
        os.mknod(tmp_path / f"IMG_{number}.jpg")
    seconds = []
    for _ in range(3):  # the least counts: other threads and the garbage of other tests take time, too
        start = time.thread_time()
        assert len(find_pictures([str(tmp_path)]).found) == count
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 50e-6 * count
    tracemalloc.start()
    found = find_pictures([str(tmp_path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.found) == count
    assert peak < 2000 * count


def test_a_misspelt_device_is_named() -> None:
    assert find_pictures(["@scren"]).unreadable == [("@scren", "no such source; did you mean @screen?")]
