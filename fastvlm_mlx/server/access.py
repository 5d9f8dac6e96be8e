"""Keys, and the names that a server answers to."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.schema import read_small_file
from fastvlm_mlx.server.settings import Settings, is_loopback

KEY_VARIABLE = "FASTVLM_API_KEY"
SHORTEST_KEY = 16

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{0,5})?")
_LONGEST_KEY = 1000
_LARGEST_FILE = 100_000


def read_keys(file: Path | None, variable: str = "") -> tuple[str, ...]:
    """The keys of a server: those in a file, one a line, and those in a variable, with commas between them.

    Lines of the file that begin with # are left out.

    Args:
        file: The file; None for none.
        variable: What `FASTVLM_API_KEY` holds.

    Raises:
        ConfigError: If the file cannot be read or has no key, or a key is too short or has other characters than
            printable ASCII without spaces.
    """
    keys = [key.strip() for key in variable.split(",") if key.strip()]
    for key in keys:
        _check_key(key, KEY_VARIABLE)
    if file is None:
        return tuple(dict.fromkeys(keys))
    name = printable(file)
    data = read_small_file(file, _LARGEST_FILE)
    if data is None:
        raise ConfigError(f"{name}: no such file; --api-key-file names one with a key on each line")
    lines = [line.strip() for line in data.decode("latin-1").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{name}: has no key; expected one on each line")
    for key in found:
        _check_key(key, name)
    return tuple(dict.fromkeys((*keys, *found)))


def _check_key(key: str, where: str) -> None:
    """Checks one key; the message never holds it."""
    if not key.isascii() or not key.isprintable() or " " in key or not SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
        raise ConfigError(
            f"{where}: a key must have {SHORTEST_KEY} to {_LONGEST_KEY} letters, digits or signs, without spaces; "
            "'openssl rand -hex 24' makes one"
        )


class Keys:
    """Tells right keys from wrong ones, in a time that depends on neither.

    Args:
        keys: The right ones; none if no key is needed.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def match(self, given: Sequence[bytes]) -> bool:
        """Whether one of the first four that were given is right."""
        digests = [_digest(key) for key in given[:4]]
        return sum(hmac.compare_digest(digest, key) for digest in digests for key in self._digests) > 0


def _digest(key: bytes) -> bytes:
    """Of one length for all keys."""
    return hashlib.sha256(key).digest()


class Hosts:
    """The names that the Host header of a request may have.

    A page can give its own name this machine's address and so read, as its own, what the server answers. It cannot
    give it another name. With a key, and through a socket file, no name needs a check: such a page has neither.

    Args:
        settings: Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        named = [host_name(host) or host.lower() for host in settings.allowed_hosts]
        self._any = (
            "*" in named or settings.unix_socket is not None or (bool(settings.api_keys) and not settings.allowed_hosts)
        )
        self._is_local = is_loopback(settings.host)
        own = socket.gethostname().lower()
        others = () if self._is_local else (own, f"{own.partition('.')[0]}.local")
        self._names = {*_LOCAL_NAMES, settings.host.lower().strip("[]").rstrip("."), *named, *others}

    def allow(self, host: str) -> bool:
        """Whether a Host header may be so."""
        asked = host_name(host)
        return self._any or (bool(asked) and (asked in self._names or (not self._is_local and _is_number(asked))))


def host_name(host: str) -> str:
    """The name in a Host header, without the port; empty if it is malformed."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower().rstrip(".") if match else ""


def _is_number(host: str) -> bool:
    """Whether a host is an address in numbers, which no page can have as its name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
