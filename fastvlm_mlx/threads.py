"""How many threads are worth having."""

import os


def cpu_threads() -> int:
    """The cores that this process may use, up to four: what work is dealt to, by MLX's CPU streams and for pictures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)
