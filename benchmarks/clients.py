"""Clients of a server, for `serving.py`: asks what each line of stdin says, with no more than Python has."""

import http.client
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PATH = "/v1/chat/completions"
LATE_PIECES = 3
"""Of each answer, before the late questions are asked."""


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
        print(json.dumps(answers), flush=True)


def _ask(port: int, body: dict[str, Any], ready: threading.Barrier | None) -> dict[str, Any]:
    data = json.dumps(body)
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", PATH, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"error: {response.status} {response.read().decode()}")
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
