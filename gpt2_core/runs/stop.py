"""How a run is told to stop: SIGTERM, SIGUSR1 (which schedulers send before they end a job) and SIGINT (Ctrl-C).

Only what is light is imported here, because a command calls `starting` before its other imports.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from gpt2_core.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SECONDS_BETWEEN_LOOKS = 0.1

T = TypeVar("T")


class StopRequest:
    """Whether a signal has told the run to stop.

    The first signal is noted, and the run ends where it can be resumed from; a second ends the process at once.
    """

    def __init__(self) -> None:
        self._by: str | None = None
        self._deferred = False

    def __bool__(self) -> bool:
        return self._by is not None

    def tell(self, by: str) -> None:
        """Tell the run to stop; `by` says what did."""
        self._by = self._by or by

    def check(self, advice: str = "give the same command again") -> None:
        """Raise Stopped if the run is to stop."""
        if self:
            raise self._stopped(advice)

    def _stopped(self, advice: str = "give the same command again") -> Stopped:
        return Stopped(f"stopped by {self._by}; {advice}")

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items; raises Stopped between two of them if the run is told to stop."""
        for item in items:
            self.check()
            yield item

    def result(self, future: Future[T]) -> T:
        """The result of `future`; raises Stopped if the run is told to stop before there is one."""
        while not self._done(future):
            self.check()
        return future.result()

    @staticmethod
    def _done(future: Future[T]) -> bool:
        """Whether there is a result, after waiting a moment for it."""
        return bool(wait([future], timeout=_SECONDS_BETWEEN_LOOKS).done)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is noted only, for the block to look at; elsewhere it raises Stopped where it arrives.

        An exception in the middle of a save would leave Orbax's writer thread waiting for ever.
        """
        self._deferred = True
        try:
            self.check()
            yield
        finally:
            self._deferred = False

    def _note(self, number: int, frame: object) -> None:
        self.tell(signal.Signals(number).name)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self._deferred:
            raise self._stopped()


@contextlib.contextmanager
def stopped_by_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """The signals of this block, noted in `request`. It must run in the process's main thread."""
    request = StopRequest() if request is None else request
    with _handled(request._note):
        yield request


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Before a run begins, while a command is still importing what it needs, a signal ends it without a traceback."""

    def end(number: int, frame: object) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name} before the run began\n".encode())
        os._exit(STOPPED)

    with _handled(end):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
