"""Ctrl-C between two steps, never within one."""

import signal
from collections.abc import Iterable, Iterator


def interruptible(steps: Iterable[int]) -> Iterator[int]:
    """The steps, ending in KeyboardInterrupt before the next one once Ctrl-C was pressed; a second Ctrl-C acts at once.

    An interrupt in the middle of handing a checkpoint to its writer would leave the writer waiting for ever.
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
