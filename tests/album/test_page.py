"""The page of a search is one file that holds everything, lets nothing else in, and takes no text for markup."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from fastvlm_mlx.album import page as module
from fastvlm_mlx.album.album import Album, Hit
from fastvlm_mlx.album.page import write_page
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.files import stat_of

EVIL = '<img src=x onerror=alert(1)> "&amp; \u202e'


class Tags(HTMLParser):
    """Notes the tags of a document with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def album(tmp_path: Path) -> Iterator[Album]:
    """Three pictures; the first has a hostile name, the last has gone."""
    folder = tmp_path / "pictures"
    (folder / "a b").mkdir(parents=True)
    with Album(folder, tmp_path / "index.sqlite") as album:
        for number, name in enumerate(('a b/<i> #?"&%41.png', "javascript:alert(1).png", "gone.png")):
            path = folder / name
            Image.new("RGB", (800, 400), (200, 40 * number, 0)).save(path)
            with album.index.changing():
                content = album.index.add_content(f"{number:064}", (800, 400), "2026-11-26")
                album.index.keep_picture(name, stat_of(str(path)), 0.0, content, None)
        (folder / "gone.png").unlink()
        yield album


def hits(album: Album, caption: str = "A red disc.") -> list[Hit]:
    found = []
    for picture in album.index.pictures():
        hit = album.hit(picture.id)
        assert hit is not None
        found.append(Hit(**{**vars(hit), "score": 0.934, "probability": 0.934, "caption": caption}))
    return found


def written(album: Album, path: Path, query: str = "a red disc", caption: str = "A red disc.") -> str:
    write_page(path, album, query, hits(album, caption), found=7)
    return path.read_text(encoding="utf-8")


def test_pictures_are_inside_the_page(album: Album, tmp_path: Path) -> None:
    text = written(album, tmp_path / "page.html")
    images = Tags(text).of("img")
    assert len(images) == 2
    for image in images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
            assert thumbnail.size == (320, 160)
    assert "gone.png cannot be read any more" in text
    assert "7 pictures found in pictures; the best 3 are shown" in text
    assert "93 %" in text
    assert "{{" not in text


def test_pictures_are_linked_from_where_the_page_is(album: Album, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    page = tmp_path / "elsewhere" / "page.html"
    links = [str(link["href"]) for link in Tags(written(album, page)).of("a")]
    paths = [hit.path for hit in hits(album)]
    assert [os.path.normpath(page.parent / unquote(link)) for link in links] == paths
    assert all(re.fullmatch(r"\./[\w./%~-]+", link) for link in links)
    assert str(tmp_path) not in page.read_text()  # which could name a person


def test_no_text_becomes_markup(album: Album, tmp_path: Path) -> None:
    harmless = Tags(written(album, tmp_path / "1.html", "x", "x"))
    text = written(album, tmp_path / "2.html", EVIL, EVIL)
    assert [tag for tag, _ in Tags(text).found] == [tag for tag, _ in harmless.found]
    assert not any(name.startswith("on") for _, attributes in Tags(text).found for name in attributes)
    assert "\u202e" not in text


def test_the_policy_allows_the_own_script_and_pictures_alone(album: Album, tmp_path: Path) -> None:
    text = written(album, tmp_path / "page.html", EVIL, EVIL)
    (policy,) = [str(meta["content"]) for meta in Tags(text).of("meta") if "http-equiv" in meta]
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    assert parts.pop("default-src") == "'none'"
    assert parts.pop("img-src") == "data:"
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert parts.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert parts == {"base-uri": "'none'", "form-action": "'none'"}
    assert not re.search(r"https?://", text)


def test_nothing_found_is_a_page_too(album: Album, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", album, "a boat", [])
    assert "Nothing was found." in (tmp_path / "page.html").read_text()


def test_a_page_holds_so_many_pictures(album: Album, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PICTURES", 1)
    write_page(tmp_path / "page.html", album, "a disc", hits(album))
    text = (tmp_path / "page.html").read_text()
    assert text.count("<li ") == 1
    assert "3 pictures found in pictures; the best 1 are shown" in text


def test_a_place_that_cannot_be_written_is_named(album: Album, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/page\.html: cannot be written"):
        write_page(tmp_path / "nowhere" / "page.html", album, "a disc", [])
