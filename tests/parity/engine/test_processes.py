"""Tasks in several processes answer as they do in one."""

import dataclasses
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parity.engine import processes
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.faults import MODEL

TASKS = {"the level": operator.attrgetter("level"), "the seed": operator.attrgetter("seed")}


def _case() -> Case:
    weights = random_weights(MODEL)
    return Case(weights, weights.arrays["wpe.weight"], level="quick", seed=5)


def _sleep(_: Case) -> None:
    print(os.getpid(), flush=True)
    time.sleep(600)


def _threads(_: Case) -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_every_task_answers_once_about_the_case():
    done = list(processes.run(TASKS, _case(), 1000, 1, tuple))
    assert {d.name: d.answer for d in done} == {"the level": "quick", "the seed": 5} and len(done) == 2


@pytest.mark.long
def test_each_of_several_processes_answers_the_same_and_computes_on_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = list(processes.run(TASKS | {"threads": _threads}, _case(), 1000, 2, tuple))
    answers = {"the level": "quick", "the seed": 5, "threads": (1, "1")}
    assert {d.name: d.answer for d in done} == answers and len(done) == 3
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_a_level_does_what_the_one_below_it_does_unless_it_says_otherwise():
    def at(level: str, **others) -> str:
        return dataclasses.replace(_case(), level=level).at("quick", "default", **others)

    assert [at(level) for level in ("quick", "prove", "default", "full")] == ["quick", "quick", "default", "default"]
    assert at("prove", prove=()) == () and at("full", full=()) == () and at("quick", prove=(), full=()) == "quick"


def test_what_a_task_leaves_as_evidence_comes_back_and_no_other_task_sees_it():
    def leave(case: Case) -> int:
        case.evidence["left"] = len(case.evidence)
        return 0

    case = _case()
    done = list(processes.run({"a": leave, "b": leave}, case, 1000, 1, tuple))
    assert [d.evidence for d in done] == [{"left": 0}, {"left": 0}] and case.evidence == {}


def test_a_large_model_and_a_gpu_have_one_process():
    assert processes.count(1000, 1, "cpu") == 1 and processes.count(1000, 9, "gpu") == 1
    assert processes.count(processes.LARGEST + 1, 9, "cpu") == 1


_SLEEPING = """
from parity.engine import processes
from tests.parity.engine.test_processes import _case, _sleep

if __name__ == "__main__":
    list(processes.run({"a": _sleep, "b": _sleep}, _case(), 1000, 2, tuple))
"""


@pytest.mark.long
def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = tmp_path / "sleeping.py"
    script.write_text(_SLEEPING, encoding="utf-8")
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    workers = [int(command.stdout.readline()) for _ in range(2)]
    command.send_signal(signal.SIGKILL)  # which leaves it no time to end them
    command.wait()
    end = time.monotonic() + 20
    while (left := [worker for worker in workers if _runs(worker)]) and time.monotonic() < end:
        time.sleep(0.1)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []


def _runs(process: int) -> bool:
    """A process that has ended and that nobody has waited for (Z) doesn't."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")
