"""Questions about pictures, as a person asks them on the page."""

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.server.conftest import SAMPLES

DESCRIBE = "What is in the picture?"
SAMPLE_2 = "A blue circle, a blue star and a yellow circle."
SAMPLE_5 = "A green cross, a purple square and a purple triangle."
HEIC = Path(__file__).parents[2] / "data" / "heic" / "plain.heic"

# Makes a DataTransfer with one picture.
TRANSFER = """
const transfer = new DataTransfer();
const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
transfer.items.add(new File([bytes], name, { type: "image/png" }));
"""


def encoded(name):
    return base64.b64encode((SAMPLES / name).read_bytes()).decode()


@pytest.fixture(scope="module")
def site(serve):
    with serve() as site:
        yield site


@pytest.fixture
def visited(visit, site):
    site.delay = 0.0
    here = visit(site)
    here.open()
    return here


def test_a_sample_picture_is_answered_with_one_press(visited):
    visited.page.locator(".sample").nth(0).click()
    article = visited.page.locator("#log article").first
    article.locator(".acts").wait_for()
    assert visited.answer == SAMPLE_2
    figures = article.locator(".figures").inner_text()
    assert re.search(r"First token\s+\d+(\.\d+)? m?s", figures)
    assert re.search(r"Answer\s+\d+ tokens", figures)
    assert re.search(r"Speed\s+[\d.]+ tokens/s", figures)
    assert re.search(r"Picture\s+9 visual tokens", figures)


def test_a_chosen_picture_is_sent_as_it_is(visited):
    visited.show("sample-5.png")
    visited.ask(DESCRIBE)
    assert visited.answer == SAMPLE_5
    (body,) = visited.asked
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{encoded('sample-5.png')}"


def test_a_dropped_picture_is_taken(visited):
    code = f'([name, data]) => {{ {TRANSFER} dispatchEvent(new DragEvent("drop", {{ dataTransfer: transfer }})); }}'
    visited.page.evaluate(code, ["sample-2.png", encoded("sample-2.png")])
    visited.page.wait_for_selector("#shown")
    visited.ask(DESCRIBE)
    assert visited.answer == SAMPLE_2


def test_a_pasted_picture_is_taken(visited):
    code = (
        f'([name, data]) => {{ {TRANSFER} dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: transfer }})); }}'
    )
    visited.page.evaluate(code, ["sample-2.png", encoded("sample-2.png")])
    visited.page.wait_for_selector("#shown")
    visited.ask(DESCRIBE)
    assert visited.answer == SAMPLE_2


def test_what_is_no_picture_is_refused_in_words(visited, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    visited.page.set_input_files("#file", tmp_path / "notes.txt")
    assert visited.page.get_by_role("alert").inner_text() == "notes.txt is not a picture."


def test_a_picture_that_the_browser_cannot_show_is_answered(visited):
    visited.page.set_input_files("#file", HEIC)
    visited.page.wait_for_selector("#not-shown")
    visited.ask(DESCRIBE)
    assert visited.answer


def test_a_damaged_picture_is_refused_by_the_server_in_words(visit, site, tmp_path):
    here = visit(site, expected=("400 (Bad Request)",))
    here.open()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    here.page.set_input_files("#file", tmp_path / "broken.png")
    here.page.wait_for_selector("#not-shown")
    article = here.ask(DESCRIBE)
    assert "Not an image" in article.get_by_role("alert").inner_text()
    here.show("sample-2.png")
    here.page.get_by_role("button", name="Remove broken.png").click()
    here.ask(DESCRIBE)
    assert here.answer == SAMPLE_2


def test_a_huge_picture_is_reduced_before_it_is_sent(visited, tmp_path):
    Image.new("RGB", (2000, 2001)).save(tmp_path / "huge.bmp")
    assert (tmp_path / "huge.bmp").stat().st_size > 12e6
    visited.page.set_input_files("#file", tmp_path / "huge.bmp")
    visited.page.locator("#shown-caption", has_text="reduced here before it is sent").wait_for()
    visited.ask(DESCRIBE)
    url = visited.asked[0]["messages"][-1]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")


def test_follow_ups_come_from_the_cache_and_know_the_earlier_answers(visited):
    visited.page.click("#open-settings")
    visited.page.check("#remember")
    visited.page.get_by_role("button", name="Done").click()
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    article = visited.ask("Count the shapes.")
    assert re.search(r"From the cache\s+\d+ of \d+ tokens", article.locator(".figures").inner_text())
    first, second = (body["messages"] for body in visited.asked)
    assert second[:1] == first
    assert second[1] == {"role": "assistant", "content": SAMPLE_2}
    assert second[2]["content"] == [{"type": "text", "text": "Count the shapes."}]


def test_the_demo_is_asked_each_question_alone(visited):
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    visited.ask("Count the shapes.")
    assert visited.answer == "3"
    assert [len(body["messages"]) for body in visited.asked] == [1, 1]


def test_a_new_picture_begins_a_new_conversation(visited):
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    visited.show("sample-5.png")
    visited.ask(DESCRIBE)
    assert visited.answer == SAMPLE_5
    assert len(visited.asked[1]["messages"][-1]["content"]) == 2


def test_a_picture_can_join_the_conversation(visited):
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    visited.show("sample-5.png")
    visited.page.click("#join")
    visited.ask(DESCRIBE)
    assert [part["type"] for part in visited.asked[1]["messages"][-1]["content"]] == ["image_url", "image_url", "text"]


def test_several_pictures_are_asked_about_together(visited):
    visited.show("sample-2.png", "sample-5.png")
    visited.page.get_by_role("button", name="Remove sample-2.png").wait_for()
    visited.ask(DESCRIBE)
    assert [part["type"] for part in visited.asked[0]["messages"][-1]["content"]] == ["image_url", "image_url", "text"]


def test_settings_reach_the_server_and_stay(visited):
    page = visited.page
    page.click("#open-settings")
    page.fill("#temperature", "0.7")
    page.fill("#max-tokens", "5")
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.get_by_role("button", name="Done").click()
    page.reload()
    visited.show("sample-2.png")
    page.select_option("#resolution", "128")
    article = visited.ask(DESCRIBE)
    (body,) = visited.asked
    assert (body["temperature"], body["max_tokens"], body["seed"], body["resolution"]) == (0.7, 5, 7, 128)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "The answer ended at 5 tokens" in article.inner_text()


def test_stop_ends_the_answer_here_and_in_the_server(visited, site):
    site.delay = 1.0
    visited.show("sample-2.png")
    visited.page.fill("#question", DESCRIBE)
    visited.page.press("#question", "Enter")
    visited.page.locator("#log .answer", has_text="A").wait_for()
    visited.page.click("#stop")
    article = visited.page.locator("#log article").last
    article.get_by_text("Stopped.").wait_for()
    assert SAMPLE_2.startswith(visited.answer.strip())
    assert visited.answer.strip() != SAMPLE_2
    assert visited.spoken() == []
    for _ in range(600):
        if not site.service.running:
            break
        visited.page.wait_for_timeout(100)
    assert site.service.running == 0


def test_an_answer_is_copied(visited):
    visited.page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    visited.show("sample-2.png")
    visited.ask(DESCRIBE).get_by_role("button", name="Copy").click()
    visited.page.get_by_role("button", name="Copied").wait_for()
    assert visited.page.evaluate("copied") == SAMPLE_2


def test_screen_readers_get_whole_sentences_only(visited):
    pieces = ["It is", " a cat. It sle", "eps on a so", "fa. Nothing el", "se is there"]
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = (
        "".join(f"data: {visited.page.evaluate('JSON.stringify', event)}\n\n" for event in events) + "data: [DONE]\n\n"
    )
    visited.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    assert visited.answer == "It is a cat. It sleeps on a sofa. Nothing else is there"
    assert visited.spoken() == ["It is a cat.", "It sleeps on a sofa.", "Nothing else is there"]


def test_clear_forgets_everything(visited):
    visited.show("sample-2.png")
    visited.ask(DESCRIBE)
    visited.page.click("#clear")
    visited.page.wait_for_selector("#welcome")
    assert visited.page.locator("#log *").count() == 0
