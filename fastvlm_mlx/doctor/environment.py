"""Checks what the machine and the installation bring, and says what to do about the rest."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import rounds_to_tf32
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import readable_bytes
from fastvlm_mlx.machine import CACHE_VARIABLE, cache_folder

PART = "environment"
DISTRIBUTION = "fastvlm-mlx"

ROOM = 3_000_000_000
"""Bytes that the released 0.5B takes on disk while it is converted: the download and the result."""


def environment() -> Iterator[Check]:
    """Yields what is known of the machine and the installation."""
    now = conditions()
    yield from _machine(now)
    yield from _blas(now)
    yield from _cache()
    yield from _extras()
    yield from _load(now)


def _fact(name: str, value: str, reason: str = "") -> Check:
    return Check(part=PART, name=name, value=value, reason=reason)


def _machine(now: Conditions) -> Iterator[Check]:
    machine = now.machine
    yield _fact("fastvlm-mlx", now.fastvlm_mlx)
    yield _fact("MLX", machine.mlx)
    yield _fact("Python", machine.python)
    yield _fact("system", machine.system)
    advice = ""
    if machine.device == "cpu" and platform.system() == "Linux" and shutil.which("nvidia-smi"):
        advice = "MLX does not use the NVIDIA GPU of this machine: pip install 'fastvlm-mlx[cuda]'"
    elif machine.device == "cpu" and platform.system() == "Darwin":
        advice = "MLX does not use the GPU: it needs Apple silicon and a native Python (`uname -m` says arm64)"
    yield _fact("device", f"{machine.device.upper()}, {machine.chip}, {machine.cores} cores", advice)
    yield _fact("memory", readable_bytes(machine.memory))
    if machine.device == "gpu" and platform.system() == "Linux":
        yield _fact("float32 products", "in TF32" if rounds_to_tf32() else "in float32")


def _blas(now: Conditions) -> Iterator[Check]:
    blas = now.blas
    threads = f", {blas.threads} threads" if blas.threads else ""
    slow = bool(blas.hint) and now.machine.device == "cpu"
    reason = f"about twenty times slower than it could be: {blas.hint}" if slow else blas.hint
    yield Check(part=PART, name="BLAS", value=blas.name + threads, reason=reason, ok=not slow)


def _cache() -> Iterator[Check]:
    """Checks that converted models can be kept, without writing anything."""
    try:
        folder = cache_folder()
    except FastVLMError as err:
        yield Check(part=PART, name="cache folder", value="none", reason=str(err), ok=False)
        return
    existing = next((place for place in (folder, *folder.parents) if place.exists()), Path(folder.anchor))
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    yield Check(
        part=PART,
        name="cache folder",
        value="writable" if writable else "cannot be written to",
        reason="" if writable else f"set {CACHE_VARIABLE} to a folder for converted models",
        ok=writable,
    )
    free = shutil.disk_usage(existing).free
    advice = f"converting the 0.5B takes {readable_bytes(ROOM)}; {CACHE_VARIABLE} chooses another disk"
    yield _fact("free disk", readable_bytes(free), "" if free >= ROOM else advice)


def _extras() -> Iterator[Check]:
    """Names the optional parts that are missing, each with the command that installs it."""
    try:
        package = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield _fact("extras", "unknown", "the package is not installed but run from its source")
        return
    requirements = metadata.requires(DISTRIBUTION) or []
    for extra in package.get_all("Provides-Extra") or []:
        needed = [line for line in requirements if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", line)]
        names = [re.split(r"[\s\[<>=!~;(]", line)[0] for line in needed]
        if DISTRIBUTION in names or "mlx" in names:  # an extra made of extras, and MLX's own builds
            continue
        missing = [name for name in names if not _is_installed(name)]
        advice = f"optional: pip install '{DISTRIBUTION}[{extra}]'" if missing else ""
        yield _fact(f"extra {extra}", f"without {', '.join(missing)}" if missing else "installed", advice)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _load(now: Conditions) -> Iterator[Check]:
    busy = now.load_average[0] > now.machine.cores
    advice = "other programs are busy: the speeds below are too low" if busy else ""
    yield _fact("load", f"{now.load_average[0]:g}", advice)
    power = now.power
    if power is None:
        return
    limits = ["low power mode is on"] if power.low_power_mode else []
    if power.thermal_warning or (power.speed_limit or 100) < 100:
        limits.append("heat limits the speed")
    yield _fact("power", power.source or "unknown", "; ".join(limits))
