"""Memory that was freed goes back to the system, where a large step begins: models are large."""

import ctypes
import gc
import sys


def give_back_memory() -> None:
    gc.collect()  # JAX lets go of the arrays that it was given when Python collects
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which keeps what is freed
        if trim is not None:
            trim(0)
