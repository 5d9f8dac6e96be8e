"""A pretended Hub on this machine: repositories with branches and commits, ranges, and a record of what it sent."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class PretendedHub:
    """A Hub that serves folders.

    Attributes:
        url: Its address.
        folder: Where it keeps its commits.
        branches: The commit of each branch, by `owner/name@branch`.
        card: The metadata of every model card.
        requests: Method and path of every request, with what it asks for.
        sent: Bytes of all files sent.
        bytes_per_second: How fast it sends.
        ranges: Whether it can send a part of a file.
        down: Whether it answers every request with an error.
        page: What it answers to every question instead of what was asked, as the network of a hotel does.
        delay: Seconds that it takes to answer a question.
        cache: The empty folder of the Hub's cache that goes with it.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache
        self.branches: dict[str, str] = {}
        self.card: Mapping[str, Any] = {}
        self.requests: list[str] = []
        self.sent = 0
        self.bytes_per_second = float("inf")
        self.ranges = True
        self.down = False
        self.page: bytes | None = None
        self.delay = 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # a reader that has gone
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, name: str, source: Path, *, without: tuple[str, ...] = (), branch: str = "main") -> str:
        """Makes a folder the newest commit of a branch; returns the commit."""
        commit = hashlib.sha1(f"{name}{len(list(self.folder.glob('*')))}".encode()).hexdigest()
        shutil.copytree(source, self.folder / commit, ignore=shutil.ignore_patterns(*without))
        self.branches[f"{name}@{branch}"] = commit
        return commit

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.requests.append(f"{request.command} {request.path}")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if self.down:
            self._send(request, 503)
        elif len(parts) < 4:
            self._send(request, 404)
        elif parts[:2] == ["api", "models"]:
            time.sleep(self.delay)
            self._answer_about("/".join(parts[2:4]), parts[4:], request)
        else:
            commit = self._commit("/".join(parts[:2]), parts[3])
            file = self.folder / commit / "/".join(parts[4:]) if commit else None
            if file is None or not file.is_file():
                self._send(request, 404, headers={"X-Error-Code": "EntryNotFound" if commit else "RepoNotFound"})
            else:
                self._send_file(request, file, commit)

    def _commit(self, name: str, revision: str) -> str:
        commit = self.branches.get(f"{name}@{revision}", revision)
        known = any(key.startswith(f"{name}@") for key in self.branches)
        return commit if known and (self.folder / commit).is_dir() else ""

    def _answer_about(self, name: str, rest: list[str], request: BaseHTTPRequestHandler) -> None:
        commit = self._commit(name, rest[1] if len(rest) > 1 else "main")
        if self.page is not None:
            self._send(request, 200, self.page)
        elif not commit:
            known = any(key.startswith(f"{name}@") for key in self.branches)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._send(request, 404, headers={"X-Error-Code": code})
        elif rest[:1] == ["tree"]:
            files = [path for path in (self.folder / commit).iterdir() if path.is_file()]
            listed = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files
            ]
            self._send(request, 200, json.dumps(listed).encode())
        else:
            info = {"id": name, "sha": commit, "siblings": [], "tags": [], "cardData": self.card}
            self._send(request, 200, json.dumps(info).encode())

    def _send_file(self, request: BaseHTTPRequestHandler, file: Path, commit: str) -> None:
        size = file.stat().st_size
        headers = {"X-Repo-Commit": commit, "ETag": f'"{commit[:8]}-{file.name}"', "Accept-Ranges": "bytes"}
        start, end, status = 0, size, 200
        asked = request.headers.get("Range")
        if asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1 if last else size, size), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with file.open("rb") as opened:
            opened.seek(start)
            self._send(request, status, opened, end - start, headers)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: Any = b"",
        length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        if request.command == "HEAD":
            return
        if length is None:
            request.wfile.write(body)
            return
        step = int(min(self.bytes_per_second / 20, 2**18))
        try:
            while length and (block := body.read(min(step, length))):
                request.wfile.write(block)
                self.sent += len(block)
                length -= len(block)
                if self.bytes_per_second < float("inf"):
                    time.sleep(0.05)
        except OSError:  # the reader has gone
            request.close_connection = True


@contextmanager
def pretended_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedHub]:
    """A Hub, and an empty cache for it, that huggingface_hub uses in this process and in its children."""
    import huggingface_hub.constants as constants
    from huggingface_hub.utils import close_session

    (folder / "commits").mkdir(parents=True)
    hub = PretendedHub(folder / "commits", folder / "cache")
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "home")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):  # this Hub may be held up
        monkeypatch.setenv(name, "60")
        monkeypatch.setattr(constants, name, 60)
    try:
        yield hub
    finally:
        close_session()
        hub.close()
