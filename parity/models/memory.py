"""Memory that was freed goes back to the system, where a large step begins: models are large."""

import ctypes
import gc
import os
import sys
from pathlib import Path

LARGE = 2**31
"""Bytes of a process from which it is worth the tenth of a second that it takes."""


def give_back_memory() -> None:
    if sys.platform != "linux":
        gc.collect()
    elif resident() > LARGE:
        gc.collect()  # JAX lets go of the arrays that it was given when Python collects
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which keeps what is freed
        if trim is not None:
            trim(0)


def resident() -> int:
    """Bytes that this process has in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
