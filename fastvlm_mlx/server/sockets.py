"""The sockets that a server listens on, bound before the model loads."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.server.settings import Settings

BACKLOG = 1024
_OTHER_FILES = 256
"""Descriptors for everything but connections."""
_REASONS = {
    errno.EADDRINUSE: "is in use by another program; choose another with --port, or a free one with --port 0",
    errno.EACCES: "may not be used by this user; choose a --port above 1023",
    errno.EADDRNOTAVAIL: "is no address of this machine; see --host",
}


def listen(settings: Settings) -> list[socket.socket]:
    """Sockets that accept connections from now on.

    Raises:
        ConfigError: If the address, or the file of a Unix socket, is in use or cannot be used.
    """
    if settings.unix_socket is not None:
        return [listen_unix(settings.unix_socket)]
    return _listen_tcp(settings.host, settings.port)


def allow_connections(number: int) -> None:
    """Lets this process hold so many connections beside its files; a Mac allows 256 of both unless a program asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def address(settings: Settings, sockets: list[socket.socket]) -> str:
    """Where a server is found: `http://127.0.0.1:8000`, or the file of its socket."""
    if settings.unix_socket is not None:
        return f"unix:{printable(settings.unix_socket)}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{printable(host)}:{sockets[0].getsockname()[1]}"


def listen_unix(path: Path) -> socket.socket:
    """A socket that only this user can open; the file of a server that has ended is replaced.

    Raises:
        ConfigError: If a server listens there, or something else has that name.
    """
    name = printable(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except BaseException as err:
        listener.close()
        if not isinstance(err, (OSError, ValueError)):
            raise
        reason = getattr(err, "strerror", None) or err
        raise ConfigError(f"{name}: cannot be a socket ({reason}); choose another file with --unix-socket") from err
    return listener


def _remove_stale(path: Path) -> None:
    """Removes a socket that no one listens on.

    Raises:
        ConfigError: If someone does, or it is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{printable(path)}: is there already, and no socket; choose another file with --unix-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # someone is too busy to answer
    raise ConfigError(f"{printable(path)}: another server listens there; choose another file with --unix-socket")


def _listen_tcp(host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as err:  # UnicodeError: a name that no host can have
        reason = getattr(err, "strerror", None) or err
        raise ConfigError(f"{printable(host)}: is no address ({printable(reason)}); see --host") from err
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            if sockets and not port:  # localhost has one port for both of its addresses
                place = (place[0], sockets[0].getsockname()[1], *place[2:])
            listener = _bound(family, kind, protocol, place, alone=len(found) == 1)
            sockets += [] if listener is None else [listener]
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "no usable address")
        for listener in sockets:
            listener.listen(BACKLOG)
    except OSError as err:
        for listener in sockets:
            listener.close()
        reason = _REASONS.get(err.errno or 0, f"cannot be listened on ({err.strerror or err})")
        raise ConfigError(f"{printable(host)}:{port} {reason}") from err
    return sockets


def _bound(family: int, kind: int, protocol: int, place: tuple[object, ...], *, alone: bool) -> socket.socket | None:
    """A socket bound to an address; None if the machine lacks that family, which is no error among several."""
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError:
        if alone:
            raise
        return None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)
    except OSError as err:
        listener.close()
        if not alone and err.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    return listener


def remove(path: Path) -> None:
    """Removes the file of a socket that is closed."""
    with suppress(OSError):
        path.unlink()
