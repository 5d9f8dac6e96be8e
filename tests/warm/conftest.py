import pytest

from fastvlm_mlx.warm import client

PATIENCE = client._PATIENCE


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A background server that is held up is waited for."""
    monkeypatch.setattr(client, "_PATIENCE", 60.0)
    monkeypatch.setattr(client, "_ASK_PATIENCE", 60.0)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A background server is waited for as it is for users."""
    monkeypatch.setattr(client, "_PATIENCE", PATIENCE)
