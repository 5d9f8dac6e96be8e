"""What is missing is named, with what to do about it."""

import os
from importlib import metadata
from pathlib import Path

import pytest

from fastvlm_mlx.backend import BLAS
from fastvlm_mlx.bench import conditions
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.environment import environment
from fastvlm_mlx.machine import Machine

SLOW = BLAS(name="reference", hint="apt install libopenblas0-pthread")


def checks() -> dict[str, Check]:
    return {check.name: check for check in environment()}


def machine(device: str) -> Machine:
    return Machine(device=device, chip="M1", cores=8, memory=16 << 30, system="macOS 15", python="3.12", mlx="0.32")


def test_the_machine_is_described() -> None:
    found = checks()
    assert {"fastvlm-mlx", "MLX", "Python", "system", "device", "memory", "BLAS", "cache folder"} <= found.keys()
    assert metadata.version("mlx") == found["MLX"].value


@pytest.mark.parametrize(("device", "ok"), [("cpu", False), ("gpu", True)])
def test_a_slow_blas_is_off_only_where_the_model_runs_on_it(
    monkeypatch: pytest.MonkeyPatch, device: str, ok: bool
) -> None:
    monkeypatch.setattr(conditions, "blas", lambda: SLOW)
    monkeypatch.setattr(conditions, "describe", lambda: machine(device))
    check = checks()["BLAS"]
    assert check.ok is ok
    assert "apt install libopenblas0-pthread" in check.reason


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_that_cannot_be_written_to_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    check = checks()["cache folder"]
    tmp_path.chmod(0o700)
    assert check.ok is False
    assert "FASTVLM_CACHE" in check.reason


def test_a_file_in_the_place_of_the_cache_folder_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "file" / "cache"))
    assert checks()["cache folder"].ok is False


def test_looking_at_the_cache_folder_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    assert checks()["cache folder"].ok
    assert not (tmp_path / "cache").exists()


def test_an_extra_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_matplotlib(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_matplotlib)
    check = checks()["extra plot"]
    assert (check.value, check.ok) == ("without matplotlib", None)
    assert "pip install 'fastvlm-mlx[plot]'" in check.reason
