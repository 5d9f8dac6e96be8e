"""`fastvlm caption --server`: the same lines as from this machine alone."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli.app import app
from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
from fastvlm_mlx.resolve import load
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.run import Running
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import listen
from tests.checkpoints import APPLE
from tests.jobs.fleets import Server, servers

KEY = "a-key-of-24-characters-1"


@pytest.fixture(scope="module")
def model(converted: Callable[..., Path]) -> Path:
    return converted("apple")


@pytest.fixture(scope="module")
def urls(model: Path) -> Iterator[str]:
    """Two real servers of one model, of which one answers a question at a time."""
    from fastvlm_mlx import Engine

    with ExitStack() as stack:
        addresses = []
        for max_batch in (1, 3):
            settings = Settings(port=0, api_keys=(KEY,), drain_seconds=0)
            service = Service("golden", settings, aliases=("apple",))
            service.weights, service.dtype, service.fingerprint = checkpoint_fingerprint(model), "float32", "fp_golden"
            sockets = listen(settings)
            stack.enter_context(Running(make_app(service, settings), service, settings, sockets))
            service.start(stack.enter_context(Engine(*load(model), max_batch=max_batch)))
            addresses.append(f"http://127.0.0.1:{sockets[0].getsockname()[1]}")
        yield ",".join(addresses)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTVLM_API_KEY", KEY)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("landscape", "portrait", "square"):
        shutil.copy(APPLE / "images" / f"{name}.png", photos)
    shutil.copy(photos / "square.png", photos / "twin.png")
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:20] = 255, 0, 0, 255
    Image.fromarray(pixels).save(photos / "transparent.png")
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    return photos


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["caption", "photos", *arguments])


def records(path: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--ask", "what=What is {name}, in {directory}?", "--ask", "mood=How is it?"),
        ("--prompt", "Caption {name}.", "--prefix", "A b", "--max-words", "5", "--background", "white"),
        ("--sentence", "--system", "Be brief.", "--resolution", "128", "--keep-openings"),
        ("--schema", "schema.json"),
    ],
)
def test_the_lines_are_those_of_this_machine(options: tuple[str, ...], urls: str, model: Path, folder: Path) -> None:
    Path("schema.json").write_text('{"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}')
    common = ("-n", "12", *options)
    alone = run("-m", str(model), "--no-warm", "-o", "alone.jsonl", *common)
    assert alone.exit_code == 3  # the picture that is torn
    result = run("--server", urls, "-o", "servers.jsonl", *common)
    assert result.exit_code == 3, result.stderr
    expected = records("alone.jsonl")
    for record in expected:
        record["settings"]["model"] = "golden"
    assert records("servers.jsonl") == expected


def test_each_goes_on_where_the_other_stopped(urls: str, model: Path, folder: Path) -> None:
    assert run("--server", urls, "-n", "4", "-o", "out.jsonl").exit_code == 3
    shutil.copy(APPLE / "images" / "tiny.png", folder)
    assert "5 done" in run("-m", str(model), "--no-warm", "-n", "4", "-o", "out.jsonl").stderr
    shutil.copy(APPLE / "images" / "large.png", folder)
    assert "6 done" in run("--server", urls, "-n", "4", "-o", "out.jsonl").stderr


def test_it_says_who_has_answered_and_never_the_key(urls: str, folder: Path) -> None:
    result = run("--server", urls, "-n", "4", "-o", "out.jsonl")
    assert all(f" by {url}" in result.stderr.splitlines()[-1] for url in urls.split(","))
    assert KEY not in result.output + Path("out.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--server", ","), 2, "--server: is empty"),
        (("--server", "ftp://a"), 2, "--server: ftp://a is no address of a server"),
        (("--server", "{url}", "--dtype", "float16"), 2, "--dtype: would change nothing with --server"),
        (("--api-key-file", "key"), 2, "--api-key-file: would change nothing without --server"),
        (("--server", "{url}", "--api-key-file", "no"), 1, "no: cannot be read (No such file or directory)"),
        (("--server", "{url}", "--api-key-file", "key"), 1, "answers 401: the key is not one of this server's"),
        (("--server", "{url}", "-m", "1.5b"), 1, "the servers hold golden, not 1.5b"),
        (("--server", "{url}", "-n", "4000"), 1, "answers with at most 2048 tokens, not 4000; start it with --max-tok"),
        (("--server", "127.0.0.1:1"), 1, "no server answers: http://127.0.0.1:1 (Connection refused); start them"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(
    arguments: tuple[str, ...], code: int, message: str, urls: str, folder: Path
) -> None:
    Path("key").write_text("# of nobody\nanother-key-of-24-letters\n")
    result = run("-o", "out.jsonl", *(each.format(url=urls.split(",")[0]) for each in arguments))
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_a_model_is_known_by_each_of_its_names(urls: str, folder: Path) -> None:
    assert run("--server", urls, "-m", "some/folder/Apple", "-n", "4", "--dry-run").exit_code == 0


def test_the_end_of_all_servers_is_an_error_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.jobs.keeper.PATIENCE", 0.1)
    monkeypatch.setattr("fastvlm_mlx.jobs.keeper._TICK", 0.02)
    with servers(1) as (server,):

        def die(handler: Any, number: int) -> bool:
            if number == 3:
                server.kill()
            return number >= 3

        server.misbehave = die
        command = ("--server", str(server.address), "-o", "out.jsonl", "--batch", "1")
        result = run(*command)
        assert result.exit_code == 1
        assert "no server for 0 minutes: http://127.0.0.1:" in result.stderr
        assert "the same command goes on when there is one" in result.stderr
        answered = [record for record in records("out.jsonl") if "text" in record]
        assert len(answered) == 2
        server.misbehave = lambda handler, number: False
        Server.start(server)
        assert f"{len(answered)} done" in run(*command).stderr
