import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from gpt2_core.errors import STOPPED, Stopped
from gpt2_core.runs.stop import SIGNALS, stopped_by_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # until the handler ran


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_where_it_is_deferred_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with stopped_by_signals() as stop:
        with stop.deferred():
            assert not stop
            send(number)
            assert stop
            with pytest.raises(Stopped, match=f"stopped by {number.name}; 3 steps are saved"):
                stop.check("3 steps are saved")
        # The next one ends the process, whatever it is doing.
        assert all(signal.getsignal(each) is signal.SIG_DFL for each in SIGNALS)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_elsewhere_it_ends_the_run_where_it_arrives():
    with pytest.raises(Stopped, match="stopped by SIGTERM; give the same command again"), stopped_by_signals():
        send(signal.SIGTERM)
        pytest.fail("nothing was raised")


def test_no_handler_of_all_errors_keeps_a_run_from_stopping():
    assert not issubclass(Stopped, Exception)


def test_it_is_seen_between_two_items_and_while_waiting():
    with stopped_by_signals() as stop, stop.deferred():
        seen = []
        with pytest.raises(Stopped):
            for item in stop.checked(range(5)):
                seen.append(item)
                if item == 2:
                    send(signal.SIGUSR1)
        assert seen == [0, 1, 2]
        with pytest.raises(Stopped):
            stop.result(Future())


def test_a_result_that_is_there_is_returned():
    future: Future[int] = Future()
    future.set_result(3)
    with stopped_by_signals() as stop:
        assert stop.result(future) == 3


_COMMAND = """
import signal, sys, time
from gpt2_core.runs.stop import starting, stopped_by_signals
if sys.argv[1] == "starting":
    with starting():
        print("ready", flush=True)
        time.sleep(60)
with stopped_by_signals() as stop, stop.deferred():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if stop:
            print("noted", flush=True)
            time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, "-c", _COMMAND, "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_before_a_run_begins_a_signal_ends_it_without_a_traceback():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", _COMMAND, "starting"], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (STOPPED, "stopped by SIGINT before the run began\n")
