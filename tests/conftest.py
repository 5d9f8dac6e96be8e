"""Fixtures that several folders share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_mlx.convert import convert_checkpoint
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.resolve import load
from tests.checkpoints import SOURCES

Converted = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets random tests run for longer than in the suite."""
    parser.addoption("--requests", type=int, default=60, help="random requests to an engine; 2000 take minutes")
    parser.addoption("--live-seconds", type=float, default=3, help="how long the page describes the camera; 30 is long")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """`converted(name, dtype="float32")`: the folder of a golden checkpoint, converted once and only to be read."""
    folders: dict[tuple[str, str], Path] = {}

    def convert(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in folders:
            folders[name, dtype] = folder = tmp_path_factory.mktemp("converted") / f"{name}-{dtype}"
            convert_checkpoint(SOURCES[name], folder, dtype=dtype, dequantize=True)
        return folders[name, dtype]

    return convert


@pytest.fixture(scope="session")
def loaded(converted: Converted) -> tuple[FastVLM, FastVLMProcessor]:
    """The golden checkpoint of Apple's layout in float32, loaded once."""
    return load(converted("apple"))
