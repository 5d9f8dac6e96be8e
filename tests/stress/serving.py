"""A server for a long time among good and bad clients: every good one gets its answer, and nothing grows.

python -m tests.stress.serving --minutes 10 --seed 0

Good clients ask questions whose answers `generate` gave before, and search an album whose folder comes and goes; bad
ones are those of tests/server/ill_behaved.
schemathesis drives the OpenAPI description meanwhile; it comes from an environment of its own, made for the run. At
the end the server is killed under load and started again. The last line is JSON; the exit code is 1 if anything was
wrong.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fastvlm_mlx.server.settings import Settings
from tests.server.ill_behaved import fields
from tests.server.ill_behaved.clients import CHAT, CLIENTS, QUICK, SEARCH, Wrong, exchange, head, post
from tests.stress.monitor import Run, check_growth, say, watch
from tests.stress.questions import Question, questions, request, text_of

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)
ROOT = Path(__file__).parents[2]
QUERIES = ("a green cross", "a blue circle", "a red star", "the word KEY", "yellow", "nothing of the kind")
CONFIG = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'


def good_client(run: Run, random: Random, pool: list[Question]) -> None:
    """Asks one question after another, and compares the answers."""
    while run.goes_on:
        question = random.choice(pool)
        path, body = request(question, random)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=120)
            with contextlib.closing(connection):
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            run.fault(f"good client at {path}: {error!r}")
            continue
        if answer.status in (429, 503):
            run.count(f"good: {answer.status}, asked again")
            time.sleep(min(float(answer.headers["retry-after"]), 2.0))
        elif answer.status != 200:
            run.fault(f"good client at {path}: {answer.status} {data[:300]!r}")
        elif (text := text_of(path, body["stream"], data)) != question.text:
            run.fault(f"{path} {question.prompt!r} {question.settings}: {text!r}, not {question.text!r}")
        else:
            run.count("good: answered rightly")


def make_album(folder: Path) -> Path:
    """A folder of the demo model's pictures, and of one that is none."""
    folder.mkdir()
    for sample in (ROOT / "fastvlm_mlx" / "demo_model").glob("sample-*.png"):
        shutil.copy(sample, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def found_by(port: int, query: str) -> tuple[str, ...] | None:
    """The names of the pictures that a search ends with; None if it was told to come again."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", SEARCH, json.dumps({"query": query}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
    if answer.status in (429, 503):
        return None
    last = json.loads(data.splitlines()[-1])
    if not last.get("done"):
        raise Wrong(f"a search for {query!r} ends with {last}")
    return tuple(hit["name"] for hit in last["hits"])


def searcher(run: Run, random: Random, found: dict[str, tuple[str, ...] | None]) -> None:
    """Searches again and again, and compares what is found."""
    while run.goes_on:
        query = random.choice(list(found))
        try:
            names = found_by(run.port, query)
        except (OSError, http.client.HTTPException, ValueError, Wrong) as error:
            run.fault(f"search for {query!r}: {error!r}")
            continue
        if names is None:
            run.count("search: asked again")
            time.sleep(0.2)
        elif names != found[query]:
            run.fault(f"search for {query!r}: {names}, not {found[query]}")
        else:
            run.count("search: found rightly")


def expected(port: int, pictures: int) -> dict[str, tuple[str, ...] | None]:
    """What searches find when the index is whole."""
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/album")
            status = json.loads(connection.getresponse().read())
        if status["state"] == "ready" and status["pictures"] == pictures:
            return {query: found_by(port, query) for query in QUERIES}
        time.sleep(0.1)
    raise SystemExit(f"the index was not made: {status}")


def mover(run: Run, folder: Path) -> None:
    """Takes the album's folder away now and then, as an unplugged disk does."""
    away = folder.with_name("away")
    while run.goes_on:
        time.sleep(3)
        folder.rename(away)
        time.sleep(1)
        away.rename(folder)
        run.count("album: taken away and brought back")


def bad_client(run: Run, random: Random) -> None:
    """Does one kind of harm after another."""
    while run.goes_on:
        client = random.choice(QUICK if random.random() < 0.95 else CLIENTS)
        seed = random.randrange(2**32)
        try:
            outcome = client(run.port, Random(seed))
        except Wrong as error:
            run.fault(f"{client.__name__} {seed}: {error}")
            continue
        except OSError as error:  # a connection that was ended; `/health` tells whether the server lives
            outcome = type(error).__name__
        run.count(f"bad: {client.__name__}: {outcome}")
        time.sleep(random.random() * 0.05)


def schemathesis(run: Run, folder: Path, program: str, seed: int) -> None:
    """Drives the description for the whole run."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    log = folder / "schemathesis.log"
    seconds = max(30, int(run.end - time.monotonic()))
    command = [program, "run", f"http://127.0.0.1:{run.port}/openapi.json", "--checks", CHECKS]
    command += ["--max-time", str(seconds), "--phases", "examples,coverage,fuzzing", "--continue-on-failure"]
    command += ["--request-retries", "5", "--request-timeout", "120", "--seed", str(seed), "--no-color"]
    with log.open("wb") as output:
        code = subprocess.run(command, cwd=folder, stdout=output, stderr=output, timeout=2 * seconds + 120).returncode
    text = log.read_text(errors="replace")
    say(text[text.find("= SUMMARY") :] if "= SUMMARY" in text else text[-2000:])
    if code:
        run.fault(f"schemathesis: exit code {code}; see {log}")


def install_schemathesis(folder: Path) -> str:
    """The program, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "schemathesis>=4"]
    subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
    return str(folder / "venv" / "bin" / "schemathesis")


def start_server(port: int, log: Path, album: Path | None = None) -> "subprocess.Popen[bytes]":
    """A server of the demo model that is ready; of an album with an index beside it."""
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "demo", "--dtype", "float32", "--port", str(port)]
    environment = dict(os.environ)
    if album is not None:
        command += ["--album", str(album)]
        environment["FASTVLM_CACHE"] = str(album.parent / "cache")
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    for _ in range(600):
        with contextlib.suppress(OSError, Wrong):
            if exchange(port, head("GET", "/ready", Connection="close")) == "200":
                return process
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start; see {log}")


def check_log(run: Run, log: Path) -> None:
    """Looks for tracebacks, and for lines that are too long or cannot be printed."""
    reasons: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(("Traceback", "Exception", "Task exception", "Fatal error")):
            run.fault(f"in the log: {line}")
        if len(line) > 1000 or not line.isprintable():
            run.fault(f"in the log: {line[:200]!r}")
        if line.startswith("refused "):
            reasons[line.split()[1]] += 1
    say(f"refused, by status: {dict(sorted(reasons.items()))}")


def check_rest(run: Run) -> None:
    """Looks whether all rows and connections are free again when nobody asks any more."""
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        waits = [
            line for line in text.splitlines() if line.startswith("fastvlm_num_requests") and not line.endswith(" 0")
        ]
        if not waits:
            break
        time.sleep(0.2)
    else:
        run.fault(f"when nobody asks: {waits}")
    say("\n".join(line for line in text.splitlines() if "_total" in line and not line.startswith("#")))


def kill_and_start_again(run: Run, process: "subprocess.Popen[bytes]", log: Path, pool: list[Question]) -> None:
    """Kills the server under load; the next one takes its port, answers, and ends in order."""
    again = Run(run.port, 3.0)
    clients = [threading.Thread(target=bad_client, args=(again, Random(n))) for n in range(4)]
    for client in clients:
        client.start()
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    for client in clients:
        client.join()
    process = start_server(run.port, log)
    after = Run(run.port, 2.0)
    good_client(after, Random(0), pool)
    run.faults += after.faults
    run.counts["good: answered rightly after kill -9"] = after.counts["good: answered rightly"]
    process.send_signal(signal.SIGTERM)
    if code := process.wait(60):
        run.fault(f"after SIGTERM: exit code {code}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--good", type=int, default=3, help="good clients")
    parser.add_argument("--bad", type=int, default=3, help="bad clients")
    parser.add_argument("--schemathesis", default="install", help="its program; `none` leaves it out")
    parser.add_argument("--folder", type=Path, help="for logs and samples; by default a temporary one, which is kept")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="serving-"))
    folder.mkdir(parents=True, exist_ok=True)
    program = install_schemathesis(folder) if arguments.schemathesis == "install" else arguments.schemathesis
    random = Random(arguments.seed)
    pool = questions(random, 60)
    log, port, samples = folder / "server.log", free_port(), list[dict[str, float]]()
    album = make_album(folder / "album")
    process = start_server(port, log, album)
    largest = {**fields.example(CHAT), "resolution": Settings().max_resolution}
    say(f"a picture of the largest resolution: {exchange(port, post(CHAT, largest))}")  # it takes the most memory
    found = expected(port, len(list(album.iterdir())) - 1)
    run = Run(port, 60 * arguments.minutes)
    try:
        tasks: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(watch, (run, process, samples))]
        tasks += [(good_client, (run, Random(random.random()), pool)) for _ in range(arguments.good)]
        tasks += [(bad_client, (run, Random(random.random()))) for _ in range(arguments.bad)]
        tasks += [(searcher, (run, Random(random.random()), found)), (mover, (run, album))]
        if program != "none":
            tasks.append((schemathesis, (run, folder, program, arguments.seed)))
        threads = [threading.Thread(target=task, args=given) for task, given in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_rest(run)
        check_growth(run, samples)
        kill_and_start_again(run, process, log, pool)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    check_log(run, log)
    for what, number in sorted(run.counts.items()):
        say(f"{number:8} {what}")
    (folder / "samples.json").write_text(json.dumps(samples))
    record = {
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "right": run.counts["good: answered rightly"],
        "found": run.counts["search: found rightly"],
        "bad": sum(number for what, number in run.counts.items() if what.startswith("bad")),
        "wrong": len(run.faults),
        "slowest_health_seconds": max((sample["health_seconds"] for sample in samples), default=None),
        "folder": str(folder),
    }
    say(json.dumps(record))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
