import socket
import sys
from pathlib import Path

import pytest

from fastvlm_mlx import ConfigError
from fastvlm_mlx.cluster.connection import connected, ray_library
from fastvlm_mlx.cluster.identity import Model, check
from fastvlm_mlx.cluster.worker import Place
from fastvlm_mlx.machine import cpu_threads


@pytest.mark.parametrize("address", ["", "photos/", "ray://head:10001", "head", "head:port", "http://head:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address; expected local, auto, or HOST:PORT"), connected(address):
        pass


def test_an_address_at_which_nothing_answers_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"{address}: nothing answers there .*ray start --head"),
            connected(address),
        ):
            pass


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"clusters need Ray; install it with: pip install 'fastvlm-mlx\[ray\]'"):
        ray_library()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("version", "mac: runs fastvlm-mlx b, not a; install the same there"),
        ("mlx", "mac: runs MLX b, not a; install the same there"),
        ("weights", "mac: has other files under the name of the model"),
        ("dtype", "mac: computes in b, not in a; set one for all with --dtype"),
    ],
)
def test_a_machine_that_would_answer_in_another_way_is_refused(key: str, message: str) -> None:
    same = dict.fromkeys(["version", "mlx", "weights", "dtype"], "a")
    check(same, same, "mac")
    with pytest.raises(ConfigError, match=message):
        check(same, {**same, key: "b"}, "mac")


def test_a_folder_is_named_as_a_whole_and_a_model_of_the_package_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Model("demo").everywhere().name == "demo"
    assert Model("mine").everywhere().name == str(tmp_path / "mine")
    assert Model("apple/FastVLM-0.5B").everywhere().name == "apple/FastVLM-0.5B"


def test_a_worker_reads_a_file_only_if_it_is_the_one_that_the_driver_sees(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"picture")
    place = Place.of(str(file))
    assert place is not None
    assert place.read() is not None
    assert place._replace(size=1).read() is None
    file.unlink()
    assert place.read() is None
    assert Place.of(str(file)) is None


def test_the_number_of_threads_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_THREADS", "3")
    assert cpu_threads() == 3
    for wrong in ("0", "many", "65", "-1"):
        monkeypatch.setenv("FASTVLM_THREADS", wrong)
        with pytest.raises(ConfigError, match=f"FASTVLM_THREADS={wrong}: expected a number of threads from 1 to 64"):
            cpu_threads()
