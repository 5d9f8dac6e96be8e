"""The page's search of an album, and the page that `fastvlm search --html` writes, in a browser."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from fastvlm_mlx.album.album import Album, Hit
from fastvlm_mlx.album.page import write_page
from fastvlm_mlx.album.updating import Updating
from fastvlm_mlx.server.album import ServedAlbum
from tests.server.browser.test_everyone import AXE, KEY, press_until
from tests.server.conftest import SAMPLES

NAMES = ("sample-1.png", "sample-2.png", "sample-5.png")
GREEN_CROSS = "A green triangle, a black cross and a green cross."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three pictures; two have a green cross."""
    folder = tmp_path_factory.mktemp("album") / "pictures"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(SAMPLES / name, folder)
    return folder


def wait_until_ready(album):
    deadline = time.monotonic() + 60
    while album.status()["state"] != "ready":
        assert time.monotonic() < deadline, album.status()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def site(serve, folder):
    album = ServedAlbum(folder, folder.parent / "index.sqlite")
    with serve(album=album) as site:
        wait_until_ready(album)
        yield site


def search(page, query="a green cross"):
    page.fill("#query", query)
    page.press("#query", "Enter")
    page.wait_for_selector("#find", state="visible")
    page.wait_for_selector("#search-said:not(:empty)", state="attached")


def test_what_is_found_is_shown_best_first(visit, site):
    here = visit(site)
    here.open("#search")
    page = here.page
    search(page)
    assert page.inner_text("#search-state") == "2 pictures found; asked about 3 of 3 pictures"
    assert page.inner_text("#search-said") == page.inner_text("#search-state")
    assert page.locator("#hits li").count() == 2
    captions = page.locator("#hits .said").all_inner_texts()
    assert all("green cross" in caption for caption in captions)
    page.wait_for_selector("#hits li:nth-child(2) img")
    assert page.evaluate("[...document.querySelectorAll('#hits img')].every((image) => image.src.startsWith('blob:'))")
    page.get_by_text("3 pictures in pictures").wait_for()
    page.select_option("#sort", "name")
    names = page.locator("#hits .name").all_inner_texts()
    assert names == sorted(names)
    search(page, "a purple square")
    assert page.locator("#hits .name").all_inner_texts() == ["sample-5.png"]


def test_a_picture_that_is_found_can_be_asked_about(visit, site):
    here = visit(site)
    here.open("#search")
    search(here.page)
    here.page.get_by_role("button", name="Ask about sample-1.png").click()
    here.page.wait_for_selector("#shown")
    here.ask("What is in the picture?")
    assert here.answer == GREEN_CROSS


def test_searching_works_by_keyboard_alone(visit, site):
    here = visit(site)
    here.open()
    page = here.page
    press_until(page, ".views a[href='#search']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#query:focus")
    page.keyboard.type("a green cross")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits li:nth-child(2)")
    press_until(page, ".hit")
    page.keyboard.press("Enter")
    page.wait_for_selector("#shown")
    assert page.evaluate("document.activeElement.id") == "question"


def test_a_focused_picture_keeps_the_focus_when_better_ones_come(visit, site):
    here = visit(site)
    here.open("#search")
    page = here.page
    search(page)
    page.locator(".hit").first.focus()
    moved = page.evaluate(
        """() => {
          const name = document.activeElement.getAttribute("aria-label");
          search.results.hits.reverse();
          showHits();
          const focused = document.activeElement;
          return [name === focused.getAttribute("aria-label"), focused.matches("li:last-child .hit")];
        }"""
    )
    assert moved == [True, True]


def test_the_index_is_followed_while_it_is_made(visit, serve, folder, tmp_path, monkeypatch):
    go_on = threading.Event()
    run = Updating.run

    def later(self, plan, engine):
        go_on.wait(60)
        yield from run(self, plan, engine)

    monkeypatch.setattr(Updating, "run", later)
    album = ServedAlbum(folder, tmp_path / "index.sqlite")
    with serve(album=album) as site:
        here = visit(site)
        here.open("#search")
        page = here.page
        page.get_by_text("Looking at new pictures: 0 of 3").wait_for()
        assert page.locator("#album-progress").is_visible()
        search(page)
        assert page.inner_text("#search-state") == "Nothing found"
        go_on.set()
        page.wait_for_selector("#hits li:nth-child(2)")  # without another press
        page.locator("#album-progress").wait_for(state="hidden")


def test_there_is_no_search_without_an_album(visit, serve):
    with serve() as site:
        here = visit(site)
        here.open("#search")
        assert here.page.locator("#search-link").is_hidden()
        assert here.page.locator("#welcome").is_visible()


def test_pictures_come_with_the_key(visit, serve, folder):
    album = ServedAlbum(folder, folder.parent / "index.sqlite")
    with serve(album=album, api_keys=(KEY,)) as site:
        wait_until_ready(album)
        here = visit(site, expected=("401 (Unauthorized)",))
        page = here.page
        page.goto(site.url + "#search")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("#search-link", state="visible")
        search(page)
        page.wait_for_selector("#hits li:nth-child(2) img")


def written(folder, tmp_path):
    """A page of the album's pictures."""
    page = tmp_path / "page.html"
    with Album(folder, folder.parent / "index.sqlite") as album:
        pictures = album.index.pictures()
        hits = []
        for rank, picture in enumerate(pictures):
            hit = album.hit(picture.id)
            score = 0.95 - 0.2 * rank
            hits.append(Hit(**{**vars(hit), "score": score, "probability": score, "date": f"2026-11-{20 - rank}"}))
        write_page(page, album, 'a "red" <shape>', hits)
    return page


@pytest.fixture
def document(browser, site, folder, tmp_path):
    """The written page on a phone; what its policy forbids and what fails is noted."""
    context = browser.new_context(viewport={"width": 375, "height": 740})
    page = context.new_page()
    noted = []
    page.on("console", lambda message: noted.append(message.text))
    page.on("request", lambda request: noted.append(request.url) if request.url.startswith("http") else None)
    page.goto(written(folder, tmp_path).as_uri())
    yield page
    assert not noted
    context.close()


def test_the_written_page_is_filtered_and_sorted(document):
    names = document.locator("#pictures li:not([hidden]) .name")
    assert document.inner_text("h1") == 'a "red" <shape>'
    assert names.all_inner_texts() == list(NAMES)
    document.select_option("#sort", "oldest")
    assert names.all_inner_texts() == list(NAMES[::-1])
    document.fill("#filter", "GREEN black")
    assert names.all_inner_texts() == ["sample-1.png"]
    assert document.inner_text("#count") == "1 of 3 shown"
    document.fill("#filter", "")
    document.select_option("#least", "0.7")
    assert set(names.all_inner_texts()) == set(NAMES[:2])
    document.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    for width in (375, 320, 1280):
        document.set_viewport_size({"width": width, "height": 740})
        assert document.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_improve(visit, site, document, scheme):
    if not Path(AXE).exists():
        pytest.skip("needs axe-core: npm install axe-core, or its axe.min.js in FASTVLM_AXE")
    here = visit(site, color_scheme=scheme)
    here.open("#search")
    search(here.page)
    here.page.wait_for_selector("#hits li:nth-child(2) img")
    document.emulate_media(color_scheme=scheme)
    for page in (here.page, document):
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")["violations"]
        assert not [(each["id"], each["nodes"][0]["html"]) for each in found]


def test_the_search_fits_a_phone(visit, site):
    here = visit(site, width=375, height=740, is_mobile=True, has_touch=True)
    here.open("#search")
    page = here.page
    search(page)
    for width in (375, 320):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, a")].filter((each) => each.offsetParent)
            .filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 24).map((each) => each.outerHTML)"""
    )
    assert not small
