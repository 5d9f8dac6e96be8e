"""`fastvlm serve`: its options, which are checked before the model loads."""

import os
import plistlib
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app
from fastvlm_mlx.server.settings import Settings
from fastvlm_mlx.server.sockets import listen

KEY = "a-key-of-24-characters-1"


def invoke(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments], env={"FASTVLM_API_KEY": "", **variables}, prog_name="fastvlm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others: give a key with --api-key-file or"),
        (["--host", ""], "can be reached by others"),
        (["--unix-socket", "s", "--port", "1"], "--port: would change nothing with --unix-socket"),
        (["--unix-socket", "s", "--no-auth"], "--no-auth: would change nothing with --unix-socket"),
        (["--media-root", "nowhere"], "--media-root nowhere: no such folder"),
        (["--port", "70000"], "--port"),
        (["--resolution", "100"], "multiple of 64"),
        (["--max-body", "64", "--max-queue-body", "32"], "--max-queue-body must be at least --max-body"),
        (["--max-batch", "0"], "--max-batch"),
        (["--temp", "nan"], "--temp"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_before_the_model_is_looked_for(arguments: list[str], message: str) -> None:
    result = invoke("no/such/model", *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("", "has no key"), ("short", "a key must have")]
)
def test_keys_that_cannot_be_used_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    result = invoke("demo", "--port", "0", "--api-key-file", str(file))
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_is_nowhere_is_an_error_before_anything_listens(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "nowhere"), "--port", "0")
    assert result.exit_code == 1
    assert "nowhere: no such folder" in result.stderr
    assert "listening" not in result.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = invoke(str(tmp_path), "--port", "0")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0].startswith("listening on http://127.0.0.1:")
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_port_in_use_is_one_line() -> None:
    (listener,) = listen(Settings(port=0))
    with listener:
        port = listener.getsockname()[1]
        result = invoke("demo", "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: 127.0.0.1:{port} is in use by another program")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be served, instead of serving it."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "fastvlm_mlx.server.run.serve",
        lambda app, service, settings, load, **_: seen.update(service=service, settings=settings),
    )
    return seen


def test_options_become_settings(served: dict[str, Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    arguments = "demo --host 0.0.0.0 --port 0 --allow-image-urls --max-body 5 --max-pixels 7 --max-images 3 --temp 0.5"
    more = ["--alias", "gpt-4o", "--api-key-file", str(keys), "--media-root", str(tmp_path), "--resolution", "128"]
    result = invoke(*arguments.split(), *more, "--allow-origin", "http://localhost:3000", "--drain-seconds", "5")
    assert result.exit_code == 0, result.stderr
    settings = served["settings"]
    assert (settings.host, settings.port, settings.api_keys) == ("0.0.0.0", 0, (KEY,))
    assert (settings.max_body_bytes, settings.max_pixels, settings.max_images) == (5_000_000, 7_000_000, 3)
    assert (settings.temperature, settings.resolution, settings.drain_seconds) == (0.5, 128, 5.0)
    assert (settings.allow_image_urls, settings.media_root) == (True, tmp_path)
    assert settings.allow_origins == ("http://localhost:3000",)
    assert served["service"].serves("gpt-4o")


def test_a_key_may_come_from_the_environment(served: dict[str, Any]) -> None:
    assert invoke("demo", "--host", "0.0.0.0", FASTVLM_API_KEY=KEY).exit_code == 0
    assert served["settings"].api_keys == (KEY,)
    assert invoke("demo", "--host", "0.0.0.0", "--no-auth").exit_code == 0
    assert served["settings"].api_keys == ()


def test_what_is_closed_stays_closed_without_an_option(served: dict[str, Any]) -> None:
    assert invoke("demo").exit_code == 0
    assert served["settings"] == Settings()
    closed = Settings()
    assert (closed.host, closed.allow_image_urls, closed.media_root, closed.allow_origins) == (
        "127.0.0.1",
        False,
        None,
        (),
    )


def test_the_property_list_starts_the_same_server_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["serve", "demo", "--port", "8001", "--print-launchd"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastvlm", *arguments])
    result = invoke(*arguments[1:], FASTVLM_API_KEY=KEY)
    assert result.exit_code == 0, result.stderr
    agent = plistlib.loads(result.stdout.encode())
    assert agent["ProgramArguments"] == [sys.executable, "-m", "fastvlm_mlx", "serve", "demo", "--port", "8001"]
    assert agent["WorkingDirectory"] == os.getcwd()
    assert KEY not in result.stdout
    assert "give the key with --api-key-file" in result.stderr
