"""Servers behind a network that loses packets, and for a while all of them: namespaces of the kernel, not a mock."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.jobs import exchange, peer
from fastvlm_mlx.jobs.asking import Asking
from fastvlm_mlx.jobs.exchange import Address
from fastvlm_mlx.jobs.fleet import Fleet
from fastvlm_mlx.jobs.task import Task
from tests.jobs.fleets import answer_of

ROOT = Path(__file__).parents[2]
SERVER = """
import time
from tests.jobs.fleets import Server
server = Server(host="{host}")
server.seconds = 0.02
print(server.port, flush=True)
time.sleep(600)
"""
TASK = Task(questions={"text": "What?"}, model="demo", weights="w" * 32, dtype="float32", keep_openings=True)


def command(text: str) -> None:
    done = subprocess.run(text.split(), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{text}: {done.stderr.strip()}")


def wait_for(notes: list[str], text: str) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not any(text in note for note in notes):
        time.sleep(0.05)


@pytest.fixture
def places() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces, each behind a wire of its own: name, the wire's end here, and the address there."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, ip and tc")
    with ExitStack() as stack:
        found = []
        for number in (1, 2):
            name, wire, net = f"fvlm{os.getpid()}-{number}", f"fv{os.getpid() % 10000}-{number}", f"10.213.{number}"
            try:
                command(f"ip netns add {name}")
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)
                command(f"ip link add {wire} type veth peer name eth0 netns {name}")
                command(f"ip addr add {net}.1/24 dev {wire}")
                command(f"ip link set {wire} up")
                command(f"ip -n {name} addr add {net}.2/24 dev eth0")
                command(f"ip -n {name} link set eth0 up")
            except OSError as error:
                pytest.skip(f"no network namespaces here ({error})")
            # A kernel without netem loses no single packets, but can still cut the wire.
            subprocess.run(f"tc qdisc add dev {wire} root netem loss 10% delay 5ms".split(), capture_output=True)
            found.append((name, wire, f"{net}.2"))
        yield found


def test_a_network_that_loses_packets_loses_no_picture(
    places: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the packets is lost, where the kernel can do that, and one wire is cut for four seconds."""
    pictures = [(f"{n}.ppm", Encoded(b"P6 1 1 255\n" + bytes((n % 256, n // 256, 0)), f"{n}.ppm")) for n in range(400)]
    notes: list[str] = []
    with ExitStack() as stack:
        addresses = []
        for name, _, host in places:
            arguments = ["ip", "netns", "exec", name, sys.executable, "-c", SERVER.format(host=host)]
            server = stack.enter_context(subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True))
            stack.callback(server.kill)
            assert server.stdout is not None
            addresses.append(Address.parse(f"{host}:{int(server.stdout.readline())}"))
        fleet = stack.enter_context(Fleet(addresses, notify=notes.append))
        fleet.start(TASK)
        monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.7)
        monkeypatch.setattr(peer, "SILENT_SECONDS", 0.7)
        end = f"ip -n {places[0][0]} link set eth0"
        cut = threading.Timer(0.5, command, [f"{end} down"])
        mended = threading.Timer(4.5, command, [f"{end} up"])
        cut.start()
        mended.start()
        begun = time.monotonic()
        records = []
        for record in Asking(TASK).records(fleet, iter(pictures)):
            records.append(record)
            time.sleep(0.01)
        mended.join()
        wait_for(notes, "answers again")
        seconds = time.monotonic() - begun
    assert [(each["file"], each.get("text")) for each in records] == [
        (name, answer_of(encoded.data, "What?")) for name, encoded in pictures
    ]
    assert any("; the others go on, and it is tried again" in note for note in notes), (notes, seconds)
    assert any("answers again" in note for note in notes), (notes, seconds)
    assert all(count for _, count in fleet.shares)
