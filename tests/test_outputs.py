"""Files that a user names for results."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastvlm_mlx import ConfigError, outputs
from fastvlm_mlx.outputs import check_output, write_output, writing

KILLED = """
import os, signal, sys
from pathlib import Path
from fastvlm_mlx.outputs import writing
with writing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_a_killed_run_left_is_used_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_output(path, b"earlier")
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert names(tmp_path) == [".report.json.partial", "report.json"]
    assert path.read_bytes() == b"earlier"
    write_output(path, b"new")
    assert names(tmp_path) == ["report.json"]
    assert path.read_bytes() == b"new"


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_output(path, b"earlier")
    with pytest.raises(ValueError, match="embedded null"), writing(path) as file:
        file.write(b"half" + Path("no\0name").read_bytes())
    assert names(tmp_path) == ["table.csv"]
    assert path.read_bytes() == b"earlier"


def test_threads_that_write_one_file_take_turns(tmp_path: Path) -> None:
    path, contents = tmp_path / "report.json", [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_output, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["report.json"]


def test_a_file_that_another_process_writes_for_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_PATIENCE", 0.05)
    path = tmp_path / "report.json"
    with writing(path) as file:
        with pytest.raises(ConfigError, match=r"report.json: cannot be written \(another process is writing it\)"):
            write_output(path, b"other")
        with pytest.raises(ConfigError, match="another process is writing it"):
            check_output(path)
        file.write(b"mine")
    assert path.read_bytes() == b"mine"


def test_a_link_and_the_permissions_of_its_target_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"earlier")
    target.chmod(0o640)
    link.symlink_to(target)
    write_output(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_checking_changes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    assert not names(tmp_path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        check_output(tmp_path / "missing" / "new")
