"""The page for everyone: by keyboard, with a screen reader, on a phone, in the dark; and for every server."""

import os
from pathlib import Path

import pytest

from tests.server.browser.test_ask import DESCRIBE, SAMPLE_2

AXE = Path(os.environ.get("FASTVLM_AXE", "node_modules/axe-core/axe.min.js"))
KEY = "a-key-of-24-characters-1"
HAS_FOCUS_RING = """() => {
  const marked = (element) => element && (getComputedStyle(element).outlineStyle !== "none");
  const focused = document.activeElement;
  return marked(focused) || marked(focused.nextElementSibling) || focused.closest(".box")?.matches(":focus-within");
}"""


@pytest.fixture(scope="module")
def site(serve):
    with serve() as site:
        yield site


def press_until(page, selector, key="Tab", most=40):
    """Moves the focus by a key until it is on an element; each step's focus can be seen."""
    for _ in range(most):
        page.keyboard.press(key)
        assert page.evaluate(HAS_FOCUS_RING), page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the focus never reached {selector}")


def test_everything_works_by_keyboard_alone(visit, site):
    here = visit(site)
    here.open()
    page = here.page
    press_until(page, ".skip", most=1)
    page.keyboard.press("Enter")
    press_until(page, ".sample")
    page.keyboard.press("Enter")
    page.locator("#log .acts").wait_for()
    assert here.answer == SAMPLE_2
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("Count the shapes.")
    page.keyboard.press("Enter")
    page.locator("#log .acts").nth(1).wait_for()
    assert here.answer == "3"
    press_until(page, ".acts button", key="Shift+Tab")
    press_until(page, "#open-settings", key="Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("0.5")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    press_until(page, ".views a[href='#live']", key="Shift+Tab")
    page.keyboard.press("Enter")
    press_until(page, "#start")
    page.keyboard.press("Space")
    page.locator("#seen li").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "pause"
    page.keyboard.press("Space")
    page.get_by_role("button", name="Go on").wait_for()
    press_until(page, "[name=preset]")
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Prompt").input_value() == "What does the text say?"


def test_escape_stops_an_answer(visit, site):
    here = visit(site)
    here.open()
    site.delay = 1.0
    here.page.locator(".sample").first.click()
    here.page.locator("#log .answer", has_text="A").wait_for()
    here.page.keyboard.press("Escape")
    here.page.get_by_text("Stopped.").wait_for()
    site.delay = 0.0


def test_the_page_fits_a_phone(visit, site):
    here = visit(site, width=375, height=740, is_mobile=True, has_touch=True)
    here.open()
    page = here.page

    def check():
        for width in (375, 320):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") == width

    check()
    assert page.get_by_role("button", name="Take a photo").is_visible()
    assert page.get_attribute("#photo", "capture") == "environment"
    page.set_input_files("#photo", "fastvlm_mlx/demo_model/sample-2.png")
    page.wait_for_selector("#shown")
    here.ask("Whatisthis" * 40)
    check()
    assert page.locator("#question").bounding_box()["y"] < 740
    page.tap("#open-settings")
    check()
    page.keyboard.press("Escape")
    here.open("#live")
    page.tap("#start")
    page.locator("#seen li").first.wait_for()
    check()
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, a")].filter((each) => each.offsetParent)
            .filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 24).map((each) => each.outerHTML)"""
    )
    assert not small  # what a finger has to hit


def test_colours_follow_the_system_and_the_switch(visit, site):
    here = visit(site, color_scheme="dark")
    here.open()
    page = here.page
    lightness = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number))"
    assert page.evaluate(lightness) < 64
    switch = page.get_by_role("button", name="Colours")
    assert switch.get_attribute("aria-label") == "Colours: as the system"
    switch.click()
    assert switch.get_attribute("aria-label") == "Colours: light"
    assert page.evaluate(lightness) > 192
    page.reload()
    assert page.evaluate(lightness) > 192


def test_nothing_moves_for_those_who_want_it_calm(visit, site):
    here = visit(site, reduced_motion="reduce")
    here.open()
    site.delay = 1.0
    here.page.locator(".sample").first.click()
    here.page.locator("#log .answer", has_text="A").wait_for()
    assert here.page.evaluate("document.getAnimations().length") == 0
    site.delay = 0.0
    here.page.locator("#log .acts").wait_for()


def test_a_server_with_a_key_asks_for_it_and_forgets_it_with_the_tab(visit, serve):
    with serve(api_keys=(KEY,)) as site:
        here = visit(site, expected=("401 (Unauthorized)",))
        page = here.page
        page.goto(site.url)
        page.get_by_label("This server needs a key").fill("a-wrong-key-of-24-letters")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("The server does not take this key.").wait_for()
        page.get_by_label("This server needs a key").fill(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#dot[data-state=ready]")
        assert page.locator("#key-panel").is_hidden()
        page.locator(".sample").first.click()
        page.locator("#log .acts").wait_for()
        assert here.answer == SAMPLE_2
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert page.evaluate("sessionStorage.length") == 1


def test_the_page_waits_while_the_model_loads(visit, serve):
    with serve(is_loaded=False) as site:
        here = visit(site, expected=("503 (Service Unavailable)",))
        page = here.page
        page.goto(site.url)
        page.get_by_text("Loading the model").wait_for()
        site.service.activity = "downloading: 40%"
        page.get_by_text("Downloading: 40%").wait_for()
        here.show("sample-2.png")
        assert page.get_by_role("button", name="Ask", exact=True).is_disabled()
        site.service.start(site.engine)
        page.wait_for_selector("#dot[data-state=ready]")
        assert page.locator("#notice").is_hidden()
        here.ask(DESCRIBE)
        assert here.answer == SAMPLE_2


def test_a_server_that_has_gone_is_noticed(visit, serve):
    with serve() as site:
        here = visit(site, expected=("ERR_CONNECTION_REFUSED",))
        here.open()
        here.show("sample-2.png")
        site.visits.remove(here)  # it outlives the server
    article = here.ask(DESCRIBE)
    assert "The server does not answer" in article.get_by_role("alert").inner_text()
    here.page.wait_for_selector("#dot[data-state=offline]")
    assert here.page.get_by_role("button", name="Ask", exact=True).is_disabled()


def test_a_full_server_says_when_to_try_again(visit, site):
    here = visit(site, expected=("429 (Too Many Requests)",))
    here.open()
    body = {"error": {"message": "the queue is full"}}
    here.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=429, json=body, headers={"retry-after": "3"})
    )
    here.show("sample-2.png")
    article = here.ask(DESCRIBE)
    assert article.get_by_role("alert").inner_text() == "The server is busy. Try again in 3 seconds."


def audited(page, where):
    """Fails if axe-core finds something serious."""
    page.evaluate(AXE.read_text())
    result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    found = [
        f"{where}: {each['id']} ({each['impact']}): {[node['target'] for node in each['nodes']]}"
        for each in result["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert not found


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core: npm install axe-core; FASTVLM_AXE is its axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_checker_finds_nothing_serious(visit, site, scheme):
    here = visit(site, color_scheme=scheme, reduced_motion="reduce")
    here.open()
    page = here.page
    audited(page, "welcome")
    page.locator(".sample").first.click()
    page.locator("#log .acts").wait_for()
    page.get_by_role("button", name="Time").click()
    here.show("sample-2.png", "sample-5.png")
    page.get_by_role("button", name="Remove sample-5.png").wait_for()
    audited(page, "answer")
    page.click("#open-settings")
    audited(page, "settings")
    page.keyboard.press("Escape")
    here.open("#live")
    audited(page, "live, off")
    page.click("#start")
    page.locator("#seen li").first.wait_for()
    audited(page, "live, on")
