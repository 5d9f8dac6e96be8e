"""A share of the stress run, always with the same seeds; `make stress` runs more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stress import sequences


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sequences.Answers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield sequences.answers_alone()


@pytest.mark.parametrize("prefix_caches", [True, False], ids=["prefix caches", "alone"])
def test_threads_get_the_answers_that_one_thread_gets(prefix_caches: bool, expected: sequences.Answers) -> None:
    sequences.run_threads(expected, range(6), 4, prefix_caches=prefix_caches)


def test_processes_that_begin_with_an_empty_cache_get_them_too(expected: sequences.Answers, tmp_path: Path) -> None:
    sequences.run_processes(expected, range(100, 104), 2, 2, tmp_path)
