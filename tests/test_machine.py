"""What the command line asks of the system's allocator."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import ctypes, re
from fastvlm_mlx.machine import tune_allocator
tune_allocator()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
block = library.malloc(64 << 20)
ctypes.memset(block, 1, 64 << 20)
with open("/proc/self/smaps_rollup") as file:
    sizes = dict(re.findall(r"(\\w+): +(\\d+) kB", file.read()))
print(int(sizes["AnonHugePages"]) // 1024, int(sizes["Rss"]) // 1024)
"""


def megabytes(**environment: str) -> tuple[int, int]:
    """Of large pages and of memory in use, after 64 MB have been written to."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**kept, **environment}
    )
    large, used = ran.stdout.split()
    return int(large), int(used)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="no large pages here",
)
def test_the_heap_of_the_command_line_has_large_pages_and_takes_no_more_memory() -> None:
    large, used = megabytes()
    assert large >= 56
    if "[madvise]" in HUGE_PAGES.read_text():
        plain, before = megabytes(MALLOC_ARENA_MAX="1")  # a user's own setting, which is left alone
        assert plain == 0
        assert used < before + 8
