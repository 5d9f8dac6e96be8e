"""Clients of a server, in a process of their own that needs no more than Python has.

As a program, this module asks what each line of stdin says; `Clients` writes these lines.
"""

import base64
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
"""Of a request to `PATH`."""

PATH = "/v1/chat/completions"
LATE_PIECES = 3
"""Of each answer, before the late questions are asked."""


def question(picture: bytes, prompt: str, resolution: int | str | None, max_tokens: int) -> Body:
    """A question about an encoded picture; its streamed answer has exactly so many tokens.

    Args:
        picture: JPEG, PNG, WebP or HEIC.
        prompt: The text.
        resolution: Pixels per side; None for the model's own.
        max_tokens: Length of the answer.
    """
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"}}
    return {
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}],
        **({} if resolution is None else {"resolution": resolution}),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass(frozen=True)
class ServedAnswer:
    """What a client saw: seconds from its connection to each piece of text, and the tokens of the answer."""

    pieces: list[float]
    tokens: int


class Clients:
    """A process that asks; leave the context to end it."""

    def __enter__(self) -> "Clients":
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, port: int, bodies: Sequence[Body], at_once: int = 1, late: int = 0) -> list[ServedAnswer]:
        """The answers to questions, of which so many are asked at once.

        Args:
            port: Of the server.
            bodies: The questions.
            at_once: How many clients there are.
            late: How many of the questions, at the end, are asked when all others have had their third piece.

        Raises:
            RuntimeError: If a question was not answered; what the clients' process wrote says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"port": port, "bodies": list(bodies), "at_once": at_once, "late": late}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process has ended")
        return [ServedAnswer(**answer) for answer in json.loads(line)]


def main() -> None:
    """Asks what each line of stdin says, and writes a line of answers for it."""
    for line in sys.stdin:
        job = json.loads(line)
        early = len(job["bodies"]) - job["late"]
        ready = threading.Barrier(early + 1) if job["late"] else None

        def ask(number: int, job: Any = job, early: int = early, ready: threading.Barrier | None = ready) -> Any:
            body = job["bodies"][number]
            if ready is None:
                return _ask(job["port"], body, None)
            try:
                if number < early:
                    return _ask(job["port"], body, ready)
                ready.wait()
                return _ask(job["port"], body, None)
            except BaseException:
                ready.abort()  # the others would wait for ever
                raise

        with ThreadPoolExecutor(job["at_once"]) as pool:
            answers = list(pool.map(ask, range(len(job["bodies"]))))
        with open(1, "w", closefd=False) as output:  # stdout is for the process that asks, not for people
            output.write(json.dumps(answers) + "\n")


def _ask(port: int, body: dict[str, Any], ready: threading.Barrier | None) -> dict[str, Any]:
    data = json.dumps(body)
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", PATH, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {response.read().decode()}")
    pieces: list[float] = []
    tokens = 0
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk["choices"]:
            pieces.append(time.perf_counter() - start)
            if ready is not None and len(pieces) == LATE_PIECES:
                ready.wait()
        else:
            if ready is not None and len(pieces) < LATE_PIECES:
                ready.wait()
            tokens = chunk["usage"]["completion_tokens"]
    connection.close()
    return {"pieces": pieces, "tokens": tokens}


if __name__ == "__main__":
    main()
