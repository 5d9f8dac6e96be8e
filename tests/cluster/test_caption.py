"""`fastvlm caption --ray` on a real cluster of two nodes."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cluster.conftest import PATIENCE, TwoNodes, needs_ray, run, start, wait_until, workers

pytestmark = needs_ray


def scene(seed: int) -> Image.Image:
    """A few coloured squares, so that answers differ."""
    rng = random.Random(seed)
    image = Image.new("RGB", (96, 96), (128, 128, 128))
    for _ in range(rng.randint(1, 4)):
        x, y, side = rng.randrange(60), rng.randrange(60), rng.randint(16, 36)
        image.paste(rng.choice([(214, 34, 34), (32, 76, 214), (250, 228, 40)]), (x, y, x + side, y + side))
    return image


def folder_of(place: Path, count: int) -> Path:
    place.mkdir()
    for number in range(count):
        scene(number).save(place / f"{number:03}.png")
    return place


def records(journal: Path) -> list[dict[str, Any]]:
    """What a journal holds, but for how long it took."""
    read = [json.loads(line) for line in journal.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of(tmp_path_factory.mktemp("ray") / "pictures", 40)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


@pytest.fixture(scope="module")
def alone(pictures: Path) -> list[dict[str, Any]]:
    """The records of a run without a cluster."""
    journal = pictures.parent / "alone.jsonl"
    assert run(pictures, "-o", journal).returncode == 3  # a picture is broken
    return records(journal)


def test_two_nodes_answer_as_one_process_does(two_nodes: TwoNodes, pictures: Path, alone: Any, tmp_path: Path) -> None:
    journal = tmp_path / "ray.jsonl"
    result = run(pictures, "-o", journal, "--ray", two_nodes.address)
    assert result.returncode == 3, result.stderr
    assert "Ray: 2 workers" in result.stderr
    assert records(journal) == alone
    assert result.stdout == ""
    assert not any(word in result.stderr for word in ("(raylet)", "INFO", "WARNING", "dashboard"))

    again = run(pictures, "-o", journal)
    assert "40 done, 1 failed before" in again.stderr


def test_what_dies_is_replaced_and_nothing_is_lost_or_doubled(two_nodes: TwoNodes, tmp_path: Path) -> None:
    """A worker is killed, then the driver, and then the power of a node fails."""
    folder, journal = folder_of(tmp_path / "many", 480), tmp_path / "ray.jsonl"
    first = start(folder, "-o", journal, "--ray", two_nodes.address)
    wait_until(lambda: journal.exists() and journal.read_text().count("\n") > 20)
    os.kill(workers()[0], signal.SIGKILL)
    count = journal.read_text().count("\n")
    wait_until(lambda: journal.read_text().count("\n") > count + 20)
    first.kill()
    first.communicate()
    wait_until(lambda: not workers())

    second = start(folder, "-o", journal, "--ray", two_nodes.address)
    count = journal.read_text().count("\n")
    wait_until(lambda: journal.read_text().count("\n") > count + 10)
    two_nodes.remove()
    _, err = second.communicate(timeout=PATIENCE)
    two_nodes.add()
    assert second.returncode == 0, err
    assert "a worker has ended" in err
    assert [record["file"] for record in records(journal)] == [f"{number:03}.png" for number in range(480)]


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a path that each process sees differently")
def test_pictures_that_only_the_driver_sees_are_sent(two_nodes: TwoNodes, pictures: Path, alone: Any) -> None:
    result = run("/proc/self/cwd/pictures", "--ray", two_nodes.address, cwd=pictures.parent)
    assert result.returncode == 3, result.stderr
    assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [record["file"] for record in alone]
    texts = [record.get("text") for record in alone]
    assert [json.loads(line).get("text") for line in result.stdout.splitlines()] == texts


def test_a_node_with_another_version_is_refused_before_work_begins(
    two_nodes: TwoNodes, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import fastvlm_mlx\nfastvlm_mlx.__version__ = '0.0.9'\n")
    two_nodes.remove()
    two_nodes.add(env_vars={"PYTHONPATH": str(tmp_path)})
    journal = tmp_path / "ray.jsonl"
    result = run(pictures, "-o", journal, "--ray", two_nodes.address)
    two_nodes.remove()
    two_nodes.add()
    assert result.returncode == 1
    assert "runs fastvlm-mlx 0.0.9, not" in result.stderr
    assert result.stderr.count("\n") == 2
    assert journal.read_bytes() == b""


def test_a_cluster_of_this_machine_is_started_and_ended(pictures: Path, alone: Any) -> None:
    """Its folder goes, too; and whoever does not know its secret is kept out."""
    before = {*Path("/tmp").glob("fastvlm-*")}
    process = start(pictures / "000.png", "--ray", "local", "--ray-cores", "1")
    wait_until(lambda: bool(workers()))
    held = workers()
    environment = Path(f"/proc/{held[0]}/environ")
    if environment.exists():
        assert b"RAY_AUTH_MODE=token" in environment.read_bytes()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out)["text"] == alone[0]["text"]
    assert {*Path("/tmp").glob("fastvlm-*")} <= before
    # What is killed ends only when it gets a processor.
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in held))
