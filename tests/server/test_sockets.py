"""The sockets that a server listens on."""

import os
import resource
import socket
import stat

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import address, allow_connections, listen, listen_unix


@pytest.fixture
def opened():
    sockets = []
    yield sockets
    for each in sockets:
        each.close()


def test_port_0_takes_a_free_one_and_tells_it(opened):
    opened += listen(Settings(port=0))
    port = opened[0].getsockname()[1]
    assert port > 0
    assert address(Settings(port=0), opened) == f"http://127.0.0.1:{port}"
    socket.create_connection(("127.0.0.1", port), 5).close()


def test_localhost_is_both_of_its_addresses_at_one_port(opened):
    opened += listen(Settings(host="localhost", port=0))
    assert len({each.getsockname()[1] for each in opened}) == 1
    socket.create_connection(("127.0.0.1", opened[0].getsockname()[1]), 5).close()


def test_a_port_in_use_is_an_error_that_says_what_to_do(opened):
    opened += listen(Settings(port=0))
    port = opened[0].getsockname()[1]
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} is in use by another program; .* --port 0"):
        listen(Settings(port=port))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", r"192.0.2.1:0 is no address of this machine; see --host"),
        ("no such host", "no such host: is no address .*; see --host"),
        ("a" * 300, "…a+: is no address .*; see --host"),
        ("\0", "is no address"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_an_error(host, message):
    with pytest.raises(ConfigError, match=message):
        listen(Settings(host=host, port=0, no_auth=True))


def test_only_its_owner_can_open_a_socket_file(opened, tmp_path):
    path = tmp_path / "socket"
    settings = Settings(unix_socket=path)
    opened += listen(settings)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert address(settings, opened) == f"unix:{path}"


def test_the_file_of_a_server_that_has_ended_is_replaced(opened, tmp_path):
    path = tmp_path / "socket"
    listen_unix(path).close()
    opened.append(listen_unix(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_the_file_of_a_live_server_is_left_alone(opened, tmp_path):
    path = tmp_path / "socket"
    opened.append(listen_unix(path))
    with pytest.raises(ConfigError, match="another server listens there; choose another file with --unix-socket"):
        listen_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and no socket"):
        listen_unix(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["s" * 200, "nowhere/socket", "a\0b"])
def test_a_file_that_cannot_be_a_socket_is_an_error(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot be a socket \(.*\); choose another file with --unix-socket"):
        listen_unix(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_server_may_hold_its_connections_where_a_process_may_hold_few_files(monkeypatch):
    limits = [(256, resource.RLIM_INFINITY)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    allow_connections(512)
    assert limits[-1] == (768, resource.RLIM_INFINITY)
    allow_connections(512)
    assert len(limits) == 2  # enough already
    limits.append((256, 500))
    allow_connections(512)
    assert limits[-1] == (500, 500)
