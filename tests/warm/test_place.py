import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from fastvlm_mlx.warm import place as place_module
from fastvlm_mlx.warm.place import OwnersSocket, Place, WarmError, peer_user


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path / "warm")
    made.make()
    return made


def test_the_folder_and_the_socket_are_their_owners_alone(place: Place) -> None:
    with place.listen():
        assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(place.socket_file.stat().st_mode) == 0o600
        assert place.is_private


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_that_others_can_open_is_refused_by_both_sides(tmp_path: Path, mode: int) -> None:
    place = Place(tmp_path / "warm")
    place.folder.mkdir()
    place.folder.chmod(mode)
    with pytest.raises(WarmError, match=r"nobody else can open.*chmod 700"):
        place.make()
    assert stat.S_IMODE(place.folder.stat().st_mode) == mode
    with pytest.raises(PermissionError):
        place.connect(1.0)


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place = Place(tmp_path / "warm")
    place.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WarmError):
        place.make()


def test_a_socket_that_a_killed_server_has_left_is_replaced(place: Place) -> None:
    place.listen().close()
    assert place.socket_file.exists()
    with pytest.raises(ConnectionRefusedError):
        place.connect(1.0)
    with place.listen(), place.connect(1.0) as connection:
        assert connection.fileno() >= 0


@pytest.mark.parametrize("length", [20, 90, 150, 240])
def test_a_path_of_any_length_is_listened_on_and_reached(tmp_path: Path, length: int) -> None:
    place = Place(tmp_path / ("x" * length) / "warm")
    place.make()
    before = os.getcwd()
    with place.listen() as listener, place.connect(1.0):
        connection, _ = listener.accept()
        connection.close()
    assert os.getcwd() == before


def test_both_ends_know_who_is_at_the_other(place: Place) -> None:
    with place.listen() as listener, place.connect(1.0) as ours:
        theirs, _ = listener.accept()
        with theirs:
            assert peer_user(ours) == peer_user(theirs) == os.geteuid()


def test_a_connection_of_another_user_is_closed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.listen() as listener, place.connect(1.0) as connection:
        monkeypatch.setattr(place_module, "peer_user", lambda _: os.geteuid() + 1)
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        assert connection.recv(1) == b""


def test_a_server_of_another_user_is_not_spoken_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.listen():
        monkeypatch.setattr(place_module, "peer_user", lambda _: os.geteuid() + 1)
        with pytest.raises(PermissionError):
            place.connect(1.0)


def test_one_lock_is_held_by_one_and_names_its_process(place: Place) -> None:
    assert place.holder() is None
    with place.locked() as first:
        assert first
        assert place.holder() == os.getpid()
        with place.locked() as second:
            assert not second
        assert place.holder() == os.getpid()
    assert place.holder() is None


def test_of_two_threads_that_lock_at_once_one_wins(place: Place) -> None:
    results: list[bool] = []
    barrier, together = threading.Barrier(8), threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        with place.locked() as held:
            results.append(held)
            together.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_a_damaged_lock_file_names_no_process(place: Place) -> None:
    with place.locked():
        place.lock_file.write_bytes(b"\xff{")
        assert place.holder() == 0


def test_the_listener_closes_what_it_refuses() -> None:
    assert issubclass(OwnersSocket, socket.socket)
