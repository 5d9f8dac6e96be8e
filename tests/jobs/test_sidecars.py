import os
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.sidecars import (
    Outcome,
    read_sidecars,
    shared_names,
    text_path,
    write_text,
    write_xmp,
    xmp_path,
)
from fastvlm_mlx.jobs.xmp import XMP


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "photo.v2.jpg"
    path.write_bytes(b"picture")
    return str(path)


def test_sidecars_are_called_as_other_programs_call_them(picture: str, tmp_path: Path) -> None:
    assert text_path(picture) == tmp_path / "photo.v2.txt"
    assert xmp_path(picture) == xmp_path(picture, "ext") == tmp_path / "photo.v2.jpg.xmp"
    assert xmp_path(picture, "plain") == tmp_path / "photo.v2.xmp"
    (tmp_path / "photo.v2.xmp").touch()
    assert xmp_path(picture) == tmp_path / "photo.v2.xmp"
    (tmp_path / "photo.v2.jpg.xmp").touch()
    assert xmp_path(picture) == tmp_path / "photo.v2.jpg.xmp"


def test_pictures_that_would_share_a_sidecar_are_known() -> None:
    assert shared_names(["a/1.jpg", "a/1.png", "b/1.jpg", "a/2.jpg"]) == {"a/1.jpg", "a/1.png"}


def test_a_text_is_on_one_line_and_a_persons_stays(picture: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.v2.txt"
    assert write_text(picture, " A dog.\nIt runs. ") is Outcome.WRITTEN
    assert path.read_bytes() == b"A dog. It runs.\n"
    assert write_text(picture, "A dog. It runs.") is Outcome.UNCHANGED
    assert write_text(picture, "Two dogs.") is Outcome.KEPT
    assert write_text(picture, "Two dogs.", own=["A dog.\nIt runs."]) is Outcome.WRITTEN
    for content in (b"my dog, beach", b"\xff\xfe"):
        path.write_bytes(content)
        assert write_text(picture, "A dog.", own=["Two dogs."]) is Outcome.KEPT
        assert path.read_bytes() == content
    path.write_bytes(b" \n")
    assert write_text(picture, "caf\u00e9 \udce9") is Outcome.WRITTEN
    assert path.read_bytes() == "caf\u00e9 ?\n".encode()
    assert write_text(picture, "Mine", overwrite=True) is Outcome.WRITTEN
    assert sorted(os.listdir(tmp_path)) == ["photo.v2.jpg", "photo.v2.txt"]
    assert Path(picture).read_bytes() == b"picture"


def test_an_xmp_sidecar_is_written_once_and_a_persons_stays(picture: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.v2.jpg.xmp"
    assert write_xmp(picture, "A dog.", generator="g") is Outcome.WRITTEN
    path.chmod(0o600)
    assert write_xmp(picture, "A dog.", generator="g") is Outcome.UNCHANGED
    assert write_xmp(picture, "Two dogs.", generator="g") is Outcome.WRITTEN
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(edited := path.read_bytes().replace(b"Two dogs.</rdf:li></rdf:Alt>", b"Mine</rdf:li></rdf:Alt>"))
    assert write_xmp(picture, "A dog.", generator="g") is Outcome.KEPT
    assert path.read_bytes() == edited
    path.write_bytes(b"<broken")
    with pytest.raises(ConfigError, match=r"photo\.v2\.jpg\.xmp: is not XMP in UTF-8 .*; it is left as it is"):
        write_xmp(picture, "A dog.", generator="g")
    assert sorted(os.listdir(tmp_path)) == ["photo.v2.jpg", "photo.v2.jpg.xmp"]


def test_what_is_said_beside_a_picture_is_read(picture: str, tmp_path: Path) -> None:
    assert read_sidecars(picture) == XMP()
    (tmp_path / "photo.v2.txt").write_text("my dog\n")
    assert read_sidecars(picture) == XMP("my dog")
    write_xmp(picture, "A dog.", generator="g", habit="plain")
    assert read_sidecars(picture) == XMP("A dog.", True)
    (tmp_path / "photo.v2.xmp").write_bytes(b"<broken")
    with pytest.raises(ConfigError, match=r"photo\.v2\.xmp: is not XMP"):
        read_sidecars(picture)


def test_nothing_is_written_into_a_photos_library(tmp_path: Path) -> None:
    originals = tmp_path / "My.photoslibrary" / "originals" / "A"
    originals.mkdir(parents=True)
    (originals / "a.heic").touch()
    (tmp_path / "link").symlink_to(originals)
    for picture in (originals / "a.heic", tmp_path / "link" / "a.heic"):
        for write in (lambda: write_text(str(picture), "A"), lambda: write_xmp(str(picture), "A", generator="g")):  # noqa: B023
            with pytest.raises(ConfigError, match="is in a Photos library, into which nothing is written"):
                write()
    assert os.listdir(originals) == ["a.heic"]


def test_long_names_and_names_that_are_not_utf8_get_sidecars(tmp_path: Path) -> None:
    for name in (b"x" * 247 + b".jpg", b"caf\xe9.jpg"):
        picture = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        try:
            Path(picture).touch()
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        assert write_text(picture, "A dog.") is Outcome.WRITTEN
        assert write_xmp(picture, "A dog.", generator="g") is Outcome.WRITTEN
    too_long = str(tmp_path / ("x" * 251 + ".jpg"))
    assert read_sidecars(too_long) == XMP()
    with pytest.raises(ConfigError, match=r"cannot be written \(File name too long\)"):
        write_xmp(too_long, "A", generator="g")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"photo\.txt: cannot be written \(No such file or directory\)"):
        write_text(str(tmp_path / "gone" / "photo.jpg"), "A dog.")
