"""Memory that was freed goes back to the system, where a large step begins: models are large."""

import ctypes
import gc
import os
import sys
from pathlib import Path

LARGE = 1 << 30
"""Bytes that a comparison has taken, from which on it is worth a tenth of a second, and more where the process holds
much else."""

_before = 0


def begin_comparison() -> None:
    """What the process holds from here on belongs to a comparison."""
    global _before
    _before = resident() if sys.platform == "linux" else 0


def give_back_memory() -> None:
    """Free what nothing refers to, and return it to the system, if the comparison has taken much."""
    if sys.platform != "linux":
        gc.collect()
    elif resident() > _before + LARGE:
        gc.collect()  # JAX lets go of the arrays that it was given when Python collects
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which keeps what is freed
        if trim is not None:
            trim(0)


def resident() -> int:
    """Bytes that this process has in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
