import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs import views as module
from fastvlm_mlx.inputs.images import load_image
from fastvlm_mlx.inputs.views import Choice, View, views
from tests import films, pdfs

RED, GREEN, BLUE = (1, 0, 0), (0, 1, 0), (0, 0, 1)


def seen(source: object, **choice: Any) -> list[View]:
    return list(views(source, Choice(**choice)))


def colours(found: list[View]) -> list[list[int]]:
    """The colour in the middle of each picture."""
    images = [np.asarray(load_image(view.source)) for view in found]
    return [(image[image.shape[0] // 2, image.shape[1] // 2] > 127).astype(int).tolist() for image in images]


@pytest.fixture
def paper(tmp_path: Path) -> str:
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdfs.pdf([RED, GREEN, BLUE]))
    return str(path)


@pytest.fixture
def film(tmp_path: Path) -> str:
    """Ten frames a second, but for the last, which is shorter."""
    pytest.importorskip("av", reason="the extra video is not installed")
    return str(films.write(tmp_path / "film.mp4", [i / 10 for i in range(20)]))


@pytest.fixture
def animation(tmp_path: Path) -> str:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 100, 800], lossless=True)
    return str(path)


def test_the_pages_of_a_pdf_are_those_that_are_named(paper: str) -> None:
    assert colours(seen(f"{paper}#2-3")) == [list(GREEN), list(BLUE)]
    assert colours(seen(f"{paper}#3,1")) == [list(BLUE), list(RED)]
    assert [view.name for view in seen(f"{paper}#2-")] == [f"{paper}#2", f"{paper}#3"]
    assert [view.part.page for view in seen(paper, whole=True) if view.part] == [1, 2, 3]
    assert colours(seen(paper)) == [list(RED)]


def test_the_longer_side_of_a_page_has_twice_the_pixels_that_the_model_sees(paper: str) -> None:
    (view,) = seen(paper, resolution=512)
    assert load_image(view.source).size == (724, 1024)


def test_a_page_is_upright(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    (tmp_path / "turned.pdf").write_bytes(pdfs.pdf([RED], (200, 100), extra="/Rotate 90"))
    (view,) = seen(str(tmp_path / "turned.pdf"), resolution=64)
    image = np.asarray(load_image(view.source))
    assert image.shape == (128, 64, 3)
    assert image[4, -4].tolist() == [0, 0, 0]  # the corner was turned to the right
    assert image[4, 4].tolist() == [255, 0, 0]


def test_a_page_of_ten_metres_makes_a_picture_of_the_usual_size(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    (tmp_path / "wide.pdf").write_bytes(pdfs.pdf([RED], (28346, 2)))
    (view,) = seen(str(tmp_path / "wide.pdf"), resolution=128)
    assert load_image(view.source).size == (256, 1)


def test_of_five_thousand_pages_one_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    from fastvlm_mlx.inputs.pdf import Document

    drawn: list[int] = []
    real = Document.render
    monkeypatch.setattr(Document, "render", lambda self, page, side: drawn.append(page) or real(self, page, side))
    path = tmp_path / "long.pdf"
    path.write_bytes(pdfs.pdf([RED] * 5000))
    notes: list[str] = []
    assert len(list(views(str(path), Choice(resolution=64), notify=notes.append))) == 1
    assert drawn == [1]
    assert notes == [f"{path}: page 1 of 5000 pages; add #2 or #1-3"]


def test_a_pdf_that_cannot_be_read_says_why(tmp_path: Path, paper: str) -> None:
    whole = Path(paper).read_bytes()
    for data, message in {
        pdfs.locked(): "the PDF has a password; save a copy without it",
        pdfs.pdf([]): "not a PDF that can be read; it is damaged, incomplete or without pages",
        b"%PDF-1.7 nothing": "not a PDF that can be read",
        whole[:60]: "not a PDF that can be read",
    }.items():
        (tmp_path / "bad.pdf").write_bytes(data)
        with pytest.raises(ImageError, match=rf"bad\.pdf: {message}"):
            seen(str(tmp_path / "bad.pdf"))
    with pytest.raises(ImageError, match=r"paper\.pdf: there is no page 4; it has 3 pages$"):
        seen(f"{paper}#4")
    with pytest.raises(ImageError, match=r"paper\.pdf#t=1: a PDF has pages, not times; name one as #2$"):
        seen(f"{paper}#t=1")


def test_a_film_gives_frames_evenly_or_at_its_moments(film: str) -> None:
    def numbers(name: str, **choice: Any) -> list[int]:
        return [films.number_of(np.asarray(load_image(view.source))) for view in seen(name, **choice)]

    assert numbers(film) == [2, 7, 12, 16]
    assert numbers(film, frames=2) == [4, 14]
    assert numbers(film, every=0.5) == [0, 5, 10, 15]
    assert numbers(f"{film}#t=1.25") == [12]
    assert numbers(f"{film}#t=1,2", frames=2) == [12, 17]
    assert [view.name for view in seen(f"{film}#t=1,2", every=0.5)] == [f"{film}#t=1", f"{film}#t=1.5"]


def test_what_was_chosen_of_many_is_said_unless_it_was_requested(film: str) -> None:
    notes: list[str] = []
    list(views(film, Choice(), notify=notes.append))
    assert notes == [f"{film}: 4 frames of 1.94 s; --frames or #t=1.5 takes others"]
    list(views(film, Choice(frames=1), notify=notes.append))
    list(views(f"{film}#t=1", Choice(), notify=notes.append))
    assert len(notes) == 1


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".avi", ".h264"])
def test_films_of_other_kinds_are_read_back_and_forth(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    from fastvlm_mlx.inputs.video import open_film

    codec = "mpeg4" if suffix == ".avi" else "libx264"
    film = films.write(tmp_path / f"film{suffix}", [i / 25 for i in range(20)], codec=codec)
    with open_film(str(film), "film") as stream:
        numbers = [films.number_of(stream.at(moment).pixels) for moment in (0.7, 0.2, 0.0, 0.36, 9)]
    assert numbers == [17, 5, 0, 9, 19]


def test_of_an_animation_the_first_frame_is_seen_unless_more_are_requested(animation: str) -> None:
    (view,) = seen(animation)
    assert view.source == animation
    assert colours(seen(animation, frames=5)) == [list(GREEN), *[list(BLUE)] * 4]
    assert colours(seen(f"{animation}#t=0.15")) == [list(GREEN)]


def test_a_picture_has_no_parts(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert seen(str(tmp_path / "a.png")) == [View(str(tmp_path / "a.png"), str(tmp_path / "a.png"))]
    with pytest.raises(ImageError, match=r"a\.png#2: it is neither a film nor a PDF, so it has no such part$"):
        seen(f"{tmp_path}/a.png#2")


def test_files_are_known_by_their_content_not_by_their_names(tmp_path: Path, paper: str, film: str) -> None:
    (tmp_path / "scan.jpg").write_bytes(Path(paper).read_bytes())
    assert colours(seen(f"{tmp_path}/scan.jpg#3")) == [list(BLUE)]
    (tmp_path / "clip.png").write_bytes(Path(film).read_bytes())
    assert len(seen(str(tmp_path / "clip.png"))) == 4
    assert len(seen(Path(film).read_bytes())) == 4


def test_an_extra_that_is_missing_is_named_in_one_line(paper: str, film: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module_name, package in ((paper, "pypdfium2", "pdf"), (film, "av", "video")):
        monkeypatch.setitem(sys.modules, module_name, None)
        with pytest.raises(ImageError) as caught:
            seen(name)
        assert f"needs {module_name}; install it with: pip install 'fastvlm-mlx[{package}]'" in str(caught.value)


def test_the_clipboard_shows_a_picture_or_what_a_copied_file_holds(paper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "lime").save(buffer, "PNG")
    monkeypatch.setattr(module, "paste", buffer.getvalue)
    (view,) = seen("@clipboard")
    assert (view.name, colours([view])) == ("@clipboard", [list(GREEN)])
    monkeypatch.setattr(module, "paste", lambda: paper)
    assert [view.name for view in seen("@clipboard", whole=True)] == [f"{paper}#{page}" for page in (1, 2, 3)]


def test_a_device_shows_one_picture() -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    (view,) = seen("lavfi:color=lime:s=64x48")
    assert (view.name, colours([view])) == ("lavfi:color=lime:s=64x48", [list(GREEN)])
