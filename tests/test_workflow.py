"""The workflow of the hosted CI: GitHub accepts it, and it runs what a developer runs."""

import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
FILE = ROOT / ".github" / "workflows" / "ci.yml"


def validate(file: Path) -> subprocess.CompletedProcess[str]:
    """Checks a file against GitHub's schema of workflows, a copy of which comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    jobs = YAML(typ="safe").load(FILE)["jobs"]
    assert list(jobs) == ["check"]
    return dict(jobs["check"])


def test_the_workflow_meets_githubs_schema() -> None:
    done = validate(FILE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("key", "misspelled"),
    [("runs-on:", "run-on:"), ("\non:", "\nwhen:"), ("timeout-minutes: 30", "timeout-minutes: soon")],
)
def test_the_schema_refuses_a_wrong_key_or_value(tmp_path: Path, key: str, misspelled: str) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert key in text
    wrong = tmp_path / "ci.yml"
    wrong.write_text(text.replace(key, misspelled), encoding="utf-8")
    assert validate(wrong).returncode == 1


def test_it_runs_the_local_commands(job: dict[str, Any]) -> None:
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == "make lint test"


def test_it_runs_on_linux_and_on_apple_silicon_with_the_oldest_supported_python(job: dict[str, Any]) -> None:
    matrix = job["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    assert not [name for name in matrix["os"] if name.endswith(("intel", "-13", "-large"))]  # Intel Macs: no MLX
    supported = SpecifierSet(metadata("fastvlm-mlx")["Requires-Python"])
    versions = matrix["python"]
    assert all(supported.contains(version) for version in versions)
    assert not supported.contains(f"3.{min(int(version.split('.')[1]) for version in versions) - 1}")
