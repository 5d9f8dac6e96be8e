"""An album of three pictures, its index, and an engine that counts what the vision tower sees."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_mlx import Engine, FastVLM, FastVLMProcessor
from fastvlm_mlx.album.album import Album
from fastvlm_mlx.album.updating import Step, Updating
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.jobs.task import CAPTION, Task
from tests.checkpoints import APPLE

NAMES = ("landscape.png", "portrait.png", "square.png")


def task(weights: str = "w", *, questions: dict[str, str] | None = None, resolution: int = 128) -> Task:
    return Task(
        questions={CAPTION: "Describe the image."} if questions is None else questions,
        model="golden",
        weights=weights,
        dtype="float32",
        resolution=resolution,
        config=GenerationConfig(max_tokens=4),
    )


TOKENS_ONLY = task(questions={})


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures; the cache is beside it."""
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(APPLE / "images" / name, folder / name)
    return folder


class Tower:
    """The engine, and how many images its tower has seen."""

    def __init__(self, model: FastVLM, processor: FastVLMProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = Engine(model, processor)
        self.seen = 0
        encode = FastVLM.encode_image

        def counting(this, pixels, *rest):
            self.seen += len(pixels)
            return encode(this, pixels, *rest)

        monkeypatch.setattr(FastVLM, "encode_image", counting)

    def __call__(self) -> Engine:
        return self.engine


@pytest.fixture
def tower(loaded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tower]:
    counter = Tower(*loaded, monkeypatch)
    yield counter
    counter.engine.close()


@pytest.fixture
def album(photos: Path) -> Iterator[Album]:
    with Album(photos) as opened:
        yield opened


Update = Callable[..., list[Step]]


@pytest.fixture
def update(album: Album, tower: Tower) -> Update:
    """Brings the album's index up to date; returns the steps."""

    def run(asked: Task = TOKENS_ONLY, texts=None, **options) -> list[Step]:
        updating = Updating(album, asked, texts, **options)
        return list(updating.run(updating.plan(), tower))

    return run
