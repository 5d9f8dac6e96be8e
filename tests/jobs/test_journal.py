from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.journal import Predictions


def test_predictions_of_other_settings_are_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with Predictions(journal, {"model": "m"}):
        pass
    with pytest.raises(ConfigError, match=r"holds no predictions of this model with these settings; delete it"):
        Predictions(journal, {"model": "other"})
