"""Keys and host names: who may ask, and what a server may be called."""

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.server.access import Hosts, Keys, read_keys
from fastvlm_mlx.server.settings import Settings, is_loopback

KEY, OTHER = "a-key-of-24-characters-1", "a-key-of-24-characters-2"


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the camera\n{OTHER}\n\n{KEY}\n")
    assert read_keys(None, KEY) == (KEY,)
    assert read_keys(file, f" {KEY} , ") == (KEY, OTHER)
    assert read_keys(None) == ()


@pytest.mark.parametrize(
    "key", ["short", "a key with spaces in it", "ein-schlüssel-mit-umlaut", "k" * 1001, "a" * 20 + "\7"]
)
def test_a_weak_or_unsendable_key_is_refused_and_never_shown(key, tmp_path):
    file = tmp_path / "keys"
    file.write_text(key)
    for refused in (lambda: read_keys(None, key), lambda: read_keys(file)):
        with pytest.raises(ConfigError, match="a key must have 16 to 1000 letters") as error:
            refused()
        assert key not in str(error.value)


def test_a_file_without_keys_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="has no key; expected one on each line"):
        read_keys(file)
    with pytest.raises(ConfigError, match="no such file; --api-key-file names one"):
        read_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "::1"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    assert Settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.1.7", "example.org", "localhost.example.org"])
def test_another_host_needs_a_key_or_the_waiver(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"can be reached by others: .* FASTVLM_API_KEY, or say --no-auth"):
        Settings(host=host)
    assert Settings(host=host, api_keys=(KEY,)).api_keys
    assert Settings(host=host, no_auth=True).no_auth


def test_a_socket_file_needs_no_key(tmp_path):
    assert Settings(host="0.0.0.0", unix_socket=tmp_path / "socket").unix_socket


def test_one_right_key_among_those_given_is_enough():
    keys = Keys([KEY, OTHER])
    assert keys.match([b"wrong", OTHER.encode()])
    assert not keys.match([])
    assert not keys.match([KEY.encode()[:-1], KEY.encode() + b"x", b"", b"\xff"])
    assert not keys.match([b"wrong"] * 4 + [KEY.encode()])
    assert keys
    assert not Keys([])


LOCAL = ["localhost", "localhost:8000", "LocalHost.", "127.0.0.1:8000", "[::1]:8000", "[::1]"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "10.0.0.1",
    "",
    "::1",
    "localhost:80:80",
    "a b",
]


@pytest.mark.parametrize("host", LOCAL)
def test_on_loopback_the_names_of_loopback_are_allowed(host):
    assert Hosts(Settings()).allow(host)


@pytest.mark.parametrize("host", FOREIGN)
def test_on_loopback_no_other_name_is_allowed(host):
    assert not Hosts(Settings()).allow(host)


def test_names_can_be_added():
    hosts = Hosts(Settings(allowed_hosts=("Box.lan:8000", "other.lan")))
    assert hosts.allow("box.lan:9000")
    assert hosts.allow("other.lan")
    assert hosts.allow("localhost")
    assert not hosts.allow("evil.example")
    assert Hosts(Settings(allowed_hosts=("*",))).allow("evil.example")


def test_without_a_key_other_machines_may_use_addresses_and_the_own_name_but_no_other(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Box.fritz.box")
    hosts = Hosts(Settings(host="0.0.0.0", no_auth=True))
    assert all(map(hosts.allow, ["192.168.1.7:8000", "[fd00::7]:8000", "box.fritz.box", "box.local:8000", "localhost"]))
    assert not hosts.allow("evil.example")


def test_with_a_key_or_a_socket_file_every_name_will_do(tmp_path):
    assert Hosts(Settings(host="0.0.0.0", api_keys=(KEY,))).allow("box.example")
    assert Hosts(Settings(unix_socket=tmp_path / "socket")).allow("box.example")
    assert not Hosts(Settings(api_keys=(KEY,), allowed_hosts=("box.example",))).allow("evil.example")
