"""Ctrl-C takes effect between two steps, never during one."""

import signal
from collections.abc import Iterable, Iterator


def interruptible(steps: Iterable[int]) -> Iterator[int]:
    """The steps; after Ctrl-C, KeyboardInterrupt is raised before the next step. A second Ctrl-C acts immediately.

    An interrupt while a checkpoint is handed to its writer thread would leave that thread waiting for ever.
    """
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        for step in steps:
            if pressed:
                raise KeyboardInterrupt
            yield step
    finally:
        signal.signal(signal.SIGINT, before)
