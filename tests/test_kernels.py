"""MLX's compiled kernels: loaded only from a folder of the user's own, and the answer is right without them, too."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastvlm_mlx import kernels
from tests.conftest import Converted


@pytest.fixture(autouse=True)
def own_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def become_another_user(monkeypatch: pytest.MonkeyPatch) -> int:
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    return user


def test_the_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert kernels.is_usable()
    assert (tmp_path / "mlx").stat().st_mode & 0o777 == 0o700
    assert kernels.is_usable()


def test_a_folder_that_others_could_put_kernels_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    folder.chmod(0o777)
    assert not kernels.is_usable()
    folder.chmod(0o755)
    assert kernels.is_usable()
    tmp_path.chmod(0o777)  # without the sticky bit, anyone may rename what is in it
    assert not kernels.is_usable()
    tmp_path.chmod(0o1777)
    assert kernels.is_usable()
    with monkeypatch.context() as patch:
        become_another_user(patch)
        assert not kernels.is_usable()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert not kernels.is_usable()


@pytest.mark.parametrize("value", ["", "/nonexistent/folder"])
def test_a_variable_that_names_no_folder_leaves_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ takes the first variable that is set, and fails."""
    monkeypatch.setenv("TMPDIR", value)
    assert not kernels.is_usable()


def test_the_second_user_of_a_machine_gets_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tempfile.gettempdir()
    (tmp_path / "mlx").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", lambda path: os.stat_result((0o40777, *[0] * 3, 10**6, *[0] * 5)))
        kernels.move_to_own_folder([tmp_path / "a", tmp_path / "b"])
        assert os.environ["TMPDIR"] == str(tmp_path)  # both belong to somebody else
    (tmp_path / "file").touch()
    (tmp_path / "mlx").chmod(0o777)
    kernels.move_to_own_folder([tmp_path / "file", tmp_path / "cache"])
    own = tmp_path / "cache" / f"mlx-of-user-{os.geteuid()}"
    assert os.environ["TMPDIR"] == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert kernels.is_usable()
    assert tempfile.gettempdir() == temporary


def test_a_folder_that_can_be_used_stays(tmp_path: Path) -> None:
    kernels.move_to_own_folder([tmp_path / "other"])
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def test_without_kernels_the_answer_is_the_same(converted: Converted) -> None:
    code = """
import sys
from fastvlm_mlx import generate, load
model, processor = load(sys.argv[1])
print(generate(model, processor, image=sys.argv[2], prompt="Describe the image.", max_tokens=8).token_ids)
"""
    picture = Path(__file__).parent / "golden" / "apple" / "images" / "square.png"
    command = [sys.executable, "-c", code, str(converted("apple")), str(picture)]
    answers = [
        subprocess.run(command, env={**os.environ, "TMPDIR": folder}, capture_output=True, text=True, check=True).stdout
        for folder in ("/tmp", "/nonexistent")
    ]
    assert answers[0] == answers[1]
    assert answers[0].startswith("(")
