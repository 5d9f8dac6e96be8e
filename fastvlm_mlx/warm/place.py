"""Where the background server listens: a socket in a folder of the cache that only its owner can open."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.machine import cache_folder

_FOLDER, _SOCKET, _LOCK, _LOG = "warm", "socket", "lock", "log"
_LONGEST = 100
"""The most bytes of a socket's path; macOS has room for 103, Linux for 107."""
_MACOS_PEER = (0, 1, "IIh16I")
"""SOL_LOCAL, LOCAL_PEERCRED and `struct xucred` of macOS: version, user, number of groups, groups."""


class WarmError(FastVLMError):
    """A background server that cannot be started, reached or stopped."""


@dataclass(frozen=True)
class Place:
    """The folder of the background server.

    Attributes:
        folder: Its path.
    """

    folder: Path

    @classmethod
    def of_user(cls) -> Place:
        """The place in this user's cache folder.

        Raises:
            CheckpointError: If the user has no home folder.
        """
        return cls(Path(os.path.abspath(cache_folder())) / _FOLDER)

    @property
    def socket_file(self) -> Path:
        """The socket file."""
        return self.folder / _SOCKET

    @property
    def lock_file(self) -> Path:
        """The file that a server holds a lock on for as long as it lives."""
        return self.folder / _LOCK

    @property
    def log(self) -> Path:
        """What the server has to say."""
        return self.folder / _LOG

    @property
    def is_private(self) -> bool:
        """Whether the folder is there, and only this user can open what is in it."""
        try:
            status = self.folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077

    def make(self) -> None:
        """Makes the folder, unless there is one.

        Raises:
            WarmError: If it cannot be made, or others can open it.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
                self.folder.chmod(0o700)  # whatever the umask took away
        except OSError as err:
            raise WarmError(f"{printable(self.folder)}: cannot be made: {err.strerror or err}") from err
        if not self.is_private:
            raise WarmError(
                f"{printable(self.folder)}: must be a folder of yours that nobody else can open, since whoever opens "
                f"the socket in it can ask the model; make it private with `chmod 700`, or remove it"
            )

    def connect(self, timeout: float | None) -> socket.socket:
        """A connection to the server, whose every step takes at most `timeout` seconds.

        Raises:
            OSError: If nobody listens, or somebody else than this user does.
        """
        if not self.is_private:
            raise PermissionError(f"{self.folder} is not private")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            with self._address() as address:
                connection.connect(address)
            if (user := peer_user(connection)) not in (None, os.geteuid()):
                raise PermissionError(f"user {user} listens on {self.socket_file}")
        except BaseException:
            connection.close()
            raise
        return connection

    def listen(self) -> socket.socket:
        """A socket that listens; takes the place of one that a killed server has left. For who holds the lock.

        Raises:
            WarmError: If the system refuses.
        """
        listener = OwnersSocket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket_file.unlink(missing_ok=True)
            earlier = os.umask(0o177)
            try:
                with self._address() as address:
                    listener.bind(address)
            finally:
                os.umask(earlier)
            listener.listen(128)
        except OSError as err:
            listener.close()
            raise WarmError(f"{printable(self.socket_file)}: cannot be listened on: {err.strerror or err}") from err
        return listener

    @contextmanager
    def _address(self) -> Iterator[str]:
        """The name to bind or connect to: a longer path than the system allows is named from within its folder."""
        if len(os.fsencode(self.socket_file)) <= _LONGEST:
            yield str(self.socket_file)
            return
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(self.folder)
            yield _SOCKET
        finally:
            os.fchdir(here)
            os.close(here)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether the lock is held by this process for the length of the block; another server may hold it.

        Raises:
            WarmError: If the file system has no locks.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise WarmError(f"{printable(self.lock_file)}: cannot be written: {err.strerror or err}") from err
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as err:
                raise WarmError(
                    f"{printable(self.lock_file)}: cannot be locked: {err.strerror or err}; set FASTVLM_CACHE to a "
                    "folder on a disk of this machine"
                ) from err
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).encode(), 0)
            yield True
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The process that holds the lock; None if none does, 0 if that is not known."""
        try:
            with self.lock_file.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _process(file.read(1000))
        except OSError:
            pass
        return None


class OwnersSocket(socket.socket):
    """A socket that accepts no connection of other users, where the system tells who connects."""

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: If it is another user's.
        """
        connection, address = super().accept()
        if peer_user(connection) not in (None, os.geteuid(), 0):
            connection.close()
            raise ConnectionAbortedError("another user's connection")
        return connection, address


def _process(data: bytes) -> int:
    try:
        process = json.loads(data)["pid"]
    except (ValueError, TypeError, KeyError):
        return 0
    return process if isinstance(process, int) and process > 1 else 0


def peer_user(connection: socket.socket) -> int | None:
    """The user at the other end of a Unix socket; None where the system does not tell."""
    try:
        if sys.platform == "linux":
            kind = struct.Struct("=iII")  # struct ucred: process, user, group
            _, user, _ = kind.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, kind.size))
            return int(user)
        if sys.platform == "darwin":
            level, option, layout = _MACOS_PEER
            return int(struct.unpack(layout, connection.getsockopt(level, option, struct.calcsize(layout)))[1])
    except (OSError, struct.error):
        pass
    return None
