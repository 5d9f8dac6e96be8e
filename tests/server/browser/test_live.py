"""The camera, described continuously."""

import base64
import io
import re
import time

import pytest
from PIL import Image

from tests.server.browser.conftest import SCENE_SECONDS

IS_RELEASED = "seen.tracks.length > 0 && seen.tracks.every((track) => track.readyState === 'ended')"


@pytest.fixture(scope="module")
def site(serve):
    with serve() as site:
        yield site


def wait_until_quiet(live):
    """Waits until nothing has been asked for half a second."""
    end, before = time.monotonic() + 60, -1
    while before != len(live.asked):
        assert time.monotonic() < end
        before = len(live.asked)
        live.page.wait_for_timeout(500)


@pytest.fixture
def live(visit, site):
    """A visit whose camera is on, with a first description."""
    site.delay = 0.0
    here = visit(site)
    here.open("#live")
    here.page.click("#start")
    here.page.locator("#seen li").first.wait_for()
    return here


def test_scenes_are_described_once_each_one_at_a_time(live, request):
    page = live.page
    begun, least = time.monotonic(), request.config.getoption("--live-seconds")
    page.wait_for_timeout(1000 * least)
    for scene in ("yellow circle", "purple square"):
        page.locator("#seen li", has_text=scene).first.wait_for()
    page.wait_for_function("Number(document.getElementById('skipped').textContent) > 3")
    seconds = time.monotonic() - begun
    descriptions = [text.splitlines()[0] for text in page.locator("#seen li p").all_inner_texts()]
    assert [each for each in descriptions if "yellow circle" in each]
    assert [each for each in descriptions if "purple square" in each]
    assert live.most_at_once == 1
    assert len(live.asked) <= 2 * (seconds / SCENE_SECONDS + 2)  # some while one scene takes the place of the other
    assert re.fullmatch(r"\d+\.\d a second", page.locator("#rate").inner_text())
    assert re.fullmatch(r"[\d.]+ m?s", page.locator("#age").inner_text())
    assert re.fullmatch(r"[\d.]+ m?s", page.locator("#live-ttft").inner_text())
    assert page.locator("#seen li").count() <= 12
    assert set(live.spoken()) <= set(descriptions)


def test_every_frame_is_described_on_demand(live):
    live.page.select_option("#gate", "always")
    before = live.page.evaluate("live.skipped")
    for _ in range(4):
        with live.page.expect_request("**/v1/chat/completions"):
            pass
    assert live.page.evaluate("live.skipped") == before
    assert live.most_at_once == 1


def test_a_frame_is_sent_at_the_resolution_that_was_chosen(live):
    live.page.select_option("#live-resolution", "128")
    with live.page.expect_request("**/v1/chat/completions"):
        pass
    assert live.asked[-1]["resolution"] == 128
    url = live.asked[-1]["messages"][-1]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as frame:
        assert frame.size == (128, 128)


def test_a_preset_asks_something_else_at_once(live):
    assert live.page.get_by_label("Prompt").input_value() == "What is in the picture?"
    with live.page.expect_request(lambda request: "What does the text say?" in (request.post_data or "")):
        live.page.get_by_label("Read text").check()
    live.page.get_by_label("Prompt").fill("Count the shapes.")
    with live.page.expect_request(lambda request: "Count the shapes." in (request.post_data or "")):
        live.page.get_by_label("Prompt").press("Tab")


def test_pause_asks_nothing_and_goes_on(live):
    live.page.select_option("#gate", "always")
    live.page.get_by_role("button", name="Pause").click()
    wait_until_quiet(live)
    with live.page.expect_request("**/v1/chat/completions"):
        live.page.get_by_role("button", name="Go on").click()


def test_a_frame_becomes_a_picture_to_ask_about(live):
    live.page.get_by_role("button", name="Ask about this").click()
    live.page.wait_for_selector("#shown")
    live.ask("What does the text say?")
    assert live.answer in ("CAKE", "WATER")


@pytest.mark.parametrize("way", ["End", "Ask", "page hidden"])
def test_the_camera_is_released_when_left(live, way):
    if way == "End":
        live.page.get_by_role("button", name="End").click()
    elif way == "Ask":
        live.page.get_by_role("link", name="Ask", exact=True).click()
    else:
        live.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide'))")
    live.page.wait_for_function(IS_RELEASED)
    wait_until_quiet(live)


def test_a_refused_camera_is_explained(visit, site):
    here = visit(site)
    here.open("#live")
    refuse = "async () => { throw new DOMException('no', 'NotAllowedError'); }"
    here.page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = {refuse}; }}")
    here.page.click("#start")
    assert "The camera was refused" in here.page.get_by_role("alert").inner_text()


def test_slow_answers_are_of_the_newest_frame(live, site):
    """No frame waits while an answer is under way: the next one is drawn when the answer has ended."""
    live.page.select_option("#gate", "always")
    site.delay = 0.02
    before, begun = len(live.asked), time.monotonic()
    live.page.wait_for_timeout(1500)
    assert live.most_at_once == 1
    assert len(live.asked) - before < 2 + 5 * (time.monotonic() - begun)  # ten tokens and more, of 20 ms each
