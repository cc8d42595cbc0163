"""Ends a process in which nothing has finished for too long.

A collective that waits for a device which has failed, or a file system that doesn't answer, would hold it for ever.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from gpt2_core.errors import STOPPED


class Watchdog:
    """Watches, in a separate thread, the time since something was last reported to have finished."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()
        self._ended = threading.Event()

    def progress(self) -> None:
        """Something that the run waits for has finished: a step, or a part of what is due between two steps."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        message = f"nothing has finished for {self._seconds:g} s (--hang_timeout); continue with --resume"
        sys.stderr.write(f"{message}. Where each thread is:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        # At once: what hangs would hold an orderly end up too.
        os._exit(STOPPED)


@contextlib.contextmanager
def watching(seconds: float | None) -> Iterator[Watchdog]:
    """A watchdog over this block; None: nothing is watched."""
    watchdog = Watchdog(seconds or 0.0)
    if seconds is None:
        yield watchdog
        return
    thread = threading.Thread(target=watchdog._watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog._ended.set()
        thread.join()
