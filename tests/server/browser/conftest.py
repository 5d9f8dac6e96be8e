"""Headless Chromium, driven by Playwright, on the page of a server of the demo model.

Without Chromium or Playwright these tests are skipped. `FASTVLM_CHROMIUM` names a browser, and `FASTVLM_AXE` the file
`axe.min.js` of the package axe-core.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.server.album import ServedAlbum
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.run import Running
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import address, listen
from tests.server.conftest import SAMPLES

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, from the group dev")
NAMES = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = os.environ.get("FASTVLM_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SCENES = ("sample-2.png", "sample-5.png")
"""What the camera sees, in turn."""
SCENE_SECONDS = 1.2

FLAGS = (
    "--no-sandbox",  # root has none
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
)

# Runs before the page: notes what the policy forbade, what was spoken, and which cameras were opened.
WATCH = """
window.seen = { violations: [], spoken: [], tracks: [] };
addEventListener("securitypolicyviolation", (event) => {
  seen.violations.push(event.violatedDirective + " " + event.blockedURI);
});
addEventListener("DOMContentLoaded", () => {
  const region = document.getElementById("spoken");
  new MutationObserver((changes) => {
    for (const change of changes) for (const node of change.addedNodes) seen.spoken.push(node.textContent);
  }).observe(region, { childList: true, characterData: true, subtree: true });
});
const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  const stream = await open(wanted);
  seen.tracks.push(...stream.getTracks());
  return stream;
};
"""


class Site:
    """A server of the demo model that listens on a free port.

    Attributes:
        service: The model.
        engine: What answers.
        url: Of the page.
        delay: Seconds that each token takes longer.
        visits: Open pages, which are closed before it ends: a page that outlives it has much to complain of.
    """

    def __init__(self, engine: Engine, settings: Settings, album: ServedAlbum | None = None) -> None:
        self.service = Service("demo", settings, album=album)
        self.engine = engine
        self.delay = 0.0
        self.visits: list[Visit] = []
        sockets = listen(settings)
        self.url = f"{address(settings, sockets)}/"
        self.running = Running(make_app(self.service, settings), self.service, settings, sockets)


@pytest.fixture(scope="module")
def serve(demo) -> Callable[..., Any]:
    """`with serve(api_keys=(…,)) as site`: a server; `is_loaded=False` leaves its model out; `album` is searched."""

    @contextmanager
    def serve(*, is_loaded: bool = True, album: ServedAlbum | None = None, **options: Any) -> Iterator[Site]:
        step = Scheduler.step

        def step_later(scheduler: Scheduler) -> list[Row]:
            time.sleep(site.delay)
            return step(scheduler)

        with Engine(*demo, max_batch=2) as engine, pytest.MonkeyPatch.context() as patch:
            site = Site(engine, Settings(port=0, **options), album)
            patch.setattr(Scheduler, "step", step_later)
            try:
                with site.running:
                    if is_loaded:
                        site.service.start(engine)
                    yield site
                    for visit in site.visits:
                        visit.end()
            finally:
                if album is not None:
                    album.close()

    return serve


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film for the fake camera, which begins again at its end: sample pictures, each still for a while."""
    width, height, rate = 384, 384, 10
    file = tmp_path_factory.mktemp("camera") / "scenes.y4m"
    with file.open("wb") as film:
        film.write(f"YUV4MPEG2 W{width} H{height} F{rate}:1 Ip A1:1 C420\n".encode())
        for name in SCENES:
            with Image.open(SAMPLES / name) as picture:
                picture = picture.convert("RGB")
            picture.thumbnail((width, height))
            scene = Image.new("RGB", (width, height))
            scene.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
            y, cb, cr = scene.convert("YCbCr").split()
            y = y.point([16 + round(level * 219 / 255) for level in range(256)])  # film has no full range
            cb, cr = (each.point([round(128 + (level - 128) * 224 / 255) for level in range(256)]) for each in (cb, cr))
            half = [channel.resize((width // 2, height // 2), Image.Resampling.BOX) for channel in (cb, cr)]
            frame = b"FRAME\n" + b"".join(np.asarray(channel).tobytes() for channel in (y, *half))
            film.write(frame * int(rate * SCENE_SECONDS))
    return file


@pytest.fixture(scope="module")
def browser(camera: Path) -> Iterator[Any]:
    """Chromium, whose camera plays the film."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium, or its path in FASTVLM_CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-video-capture={camera}"]
        )
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """One open page, and what it did.

    Attributes:
        page: Of Playwright.
        url: Of the site.
        asked: The bodies of its requests for answers.
        expected: Parts of messages on the console that the test provokes.
    """

    page: Any
    url: str
    asked: list[Any] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    _at_once: int = 0
    most_at_once: int = 0
    _messages: list[str] = field(default_factory=list)
    _elsewhere: list[str] = field(default_factory=list)
    _has_ended: bool = False

    def watch(self) -> None:
        """Begins to note what the page does."""
        self.page.on("console", lambda message: message.type in ("error", "warning") and self._note(message.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("request", self._begun)
        for ended in ("requestfinished", "requestfailed"):
            self.page.on(ended, self._ended)

    def _note(self, text: str) -> None:
        self._messages.append(text)

    def _begun(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self._elsewhere.append(request.url)
        if request.url.endswith("/chat/completions"):
            self.asked.append(request.post_data_json)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)

    def _ended(self, request: Any) -> None:
        self._at_once -= request.url.endswith("/chat/completions")

    def end(self) -> None:
        """Closes the page; fails if it did what it must not."""
        if self._has_ended:
            return
        self._has_ended = True
        seen = self.page.evaluate("seen.violations")
        self.page.context.close()
        assert not seen, f"the policy forbade {seen}"
        assert not self._elsewhere
        unexpected = [text for text in self._messages if not any(part in text for part in self.expected)]
        assert not unexpected

    def open(self, view: str = "") -> None:
        """Opens a view, and waits until the server is ready."""
        self.page.goto(self.url + view)
        self.page.wait_for_selector("#dot[data-state=ready]", state="attached")

    def show(self, *names: str) -> None:
        """Chooses sample pictures as files."""
        self.page.set_input_files("#file", [SAMPLES / name for name in names])
        self.page.wait_for_selector(", ".join(f'#shown[alt="{name}"]' for name in names))  # one is shown, read by then

    def ask(self, question: str) -> Any:
        """Asks, and waits for the whole answer; returns its article."""
        count = self.page.locator("#log .acts").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.locator("#log .acts").nth(count).wait_for()
        return self.page.locator("#log article").last

    @property
    def answer(self) -> str:
        """The text of the latest answer."""
        return self.page.locator("#log .answer").last.inner_text()

    def spoken(self) -> list[str]:
        """What a screen reader was given."""
        return self.page.evaluate("seen.spoken")


@pytest.fixture
def visit(browser, serve) -> Iterator[Callable[..., Any]]:
    """`visit(site, width=375)`: a visit; what the page did is checked at the end of the test."""
    visits = []

    def begin(site: Site, *, width: int = 1280, height: int = 860, expected: tuple[str, ...] = (), **options: Any):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(60_000)
        context.add_init_script(WATCH)
        visit = Visit(context.new_page(), site.url, expected=expected)
        visit.watch()
        visits.append(visit)
        site.visits.append(visit)
        return visit

    yield begin
    for visit in visits:
        visit.end()
