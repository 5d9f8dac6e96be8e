from pathlib import Path

import pytest

from fastvlm_mlx.bench import plot
from fastvlm_mlx.errors import ConfigError
from tests.reports import make_report, make_row


def test_a_plot_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"written as \.svg, \.png or \.pdf"):
        plot.plot(make_report(), tmp_path / "plot.txt")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastvlm-mlx\[plot\]'"):
        plot.plot(make_report(), tmp_path / "plot.svg")


def test_a_plot_labels_the_papers_figure_as_published(tmp_path: Path) -> None:
    plot.plot(make_report(), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<!-- published, not measured: 0.5B at 1024 px -->" in text
    assert "<!-- 1024 px -->" in text


@pytest.mark.parametrize("changes", [{"resolution": 256, "pixels": 256}, {"hidden_size": 1536}])
def test_the_papers_figure_is_drawn_only_beside_what_it_is_about(tmp_path: Path, changes: dict[str, int]) -> None:
    plot.plot(make_report(make_row(**changes)), tmp_path / "plot.svg")
    assert "published" not in (tmp_path / "plot.svg").read_text()
    plot.plot(make_report(make_row(**changes), make_row(), make_row(model="same size")), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("published, not measured") == 1
