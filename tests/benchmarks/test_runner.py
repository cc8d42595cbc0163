"""Functions for the child processes, which import this module by its name, and what becomes of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.runner import Skip, run_stage
from gpt2_core.errors import UserError

HERE = "tests.benchmarks.test_runner"


def good(spec):
    print("what a library prints goes to the log")
    return {"twice": 2 * spec["number"]}


def refused(spec):
    raise UserError("--device cuda: there is none")


def unfit(spec):
    raise Skip("there is no GPU")


def killed(spec):
    os.kill(os.getpid(), 9)


def hanging(spec):
    """With a child that hangs too, as a side does whose turn it isn't."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(spec["pid"]).write_text(str(child.pid))
    child.send_signal(19)  # SIGSTOP
    time.sleep(60)


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("good", "done", ""),
        ("refused", "failed", "--device cuda: there is none"),
        ("unfit", "skipped", "there is no GPU"),
        ("killed", "failed", "ended by signal SIGKILL"),
    ],
)
def test_how_a_stage_ends(tmp_path, function, status, message):
    found = run_stage(f"{HERE}:{function}", {"number": 21}, limit=30, log=tmp_path / "log.txt")
    assert (found.status, found.message) == (status, message)
    assert found.results == ({"twice": 42} if function == "good" else None)
    if function == "good":
        assert "goes to the log" in (tmp_path / "log.txt").read_text()


def test_a_stage_that_hangs_is_killed_in_time_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    for limit in (2.5, 20):  # on a busy machine Python alone takes seconds to start
        begin = time.monotonic()
        found = run_stage(f"{HERE}:hanging", {"pid": str(pid)}, limit=limit, log=tmp_path / "log.txt")
        assert limit <= time.monotonic() - begin < limit + 5
        assert (found.status, found.message) == ("out of time", f"killed after {limit:.0f} s")
        if pid.exists():
            break
    child = int(pid.read_text())
    assert _is_gone(child)


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has waited for it yet."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False
