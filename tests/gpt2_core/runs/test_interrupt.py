import os
import signal
import time

import pytest

from gpt2_core.runs.interrupt import interruptible


@pytest.fixture(autouse=True)
def pythons_own_handler():
    """A process started in the background inherits that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_step_to_end_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for step in interruptible(range(5)):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            done.append(step)
    assert done == [0, 1, 2] and signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_acts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt):
        for step in interruptible(range(5)):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)  # two that wait together are delivered as one
            done.append(step)
    assert done == []
