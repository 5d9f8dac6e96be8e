from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.journal import Predictions


def test_predictions_of_other_settings_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    with Predictions(kept, {"model": "m"}):
        pass
    with pytest.raises(ConfigError, match=r"holds no predictions of this model with these settings; delete it"):
        Predictions(kept, {"model": "other"})
