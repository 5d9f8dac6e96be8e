from pathlib import Path

import pytest

from fastvlm_mlx.bench import plot
from fastvlm_mlx.errors import ConfigError
from tests.reports import make_report


def test_a_plot_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"written as \.svg, \.png or \.pdf"):
        plot.plot(make_report(), tmp_path / "plot.txt")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastvlm-mlx\[plot\]'"):
        plot.plot(make_report(), tmp_path / "plot.svg")


def test_a_plot_labels_the_papers_figure_as_published(tmp_path: Path) -> None:
    plot.plot(make_report(), tmp_path / "plot.svg")
    assert "published, not measured: 0.5B at 1024 px" in (tmp_path / "plot.svg").read_text()
