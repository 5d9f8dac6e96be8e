from pathlib import Path

import pytest

from fastvlm_mlx.bench.candidate import Candidate
from tests.checkpoints import APPLE


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


def test_the_demo_has_its_name_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    candidate = Candidate.load("demo")
    assert candidate.name == "demo"
    assert candidate.load_seconds
    assert len(candidate.sha256 or "") == 64


def test_a_folder_is_called_by_its_name_without_the_path(tmp_path: Path) -> None:
    candidate = Candidate.load(str(APPLE / "reparam"))
    assert candidate.name == "reparam"
    assert candidate.folder is not None
    assert candidate.folder.parent == tmp_path / "cache"
