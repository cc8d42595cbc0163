"""Tasks on one case in several processes at once: compiling, which is most of what they do, uses one core.

Processes and not threads, because a task switches the compiler's options, float64 and random states for all of one.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

from parity.engine.errors import EngineError

# What tasks are about: a dataclass with a field `evidence`, a dict that is empty for each task.
Case = Any
Task = Callable[[Case], Any]

# Each process has both frameworks in memory, about a gigabyte.
MOST = 4
# Parameters. Larger models keep every core busy by themselves, and two of them fill the memory; the threads of smaller
# ones wait for each other longer than they compute.
LARGEST = 10_000_000
# Read by PyTorch's and numpy's libraries when they are loaded: what is computed is tiny, and threads that wait for work
# keep a core busy that another process could use.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

_case: Case


@dataclasses.dataclass(frozen=True)
class Done:
    """A task's name, what it returned and left as evidence, and its seconds."""

    name: str
    answer: Any
    evidence: dict[str, Any]
    seconds: float


def count(parameters: int, tasks: int, device: str) -> int:
    """In how many processes to run so many tasks on a model of so many parameters; 1 is this one."""
    if device != "cpu" or parameters > LARGEST:
        return 1
    return min(tasks, os.cpu_count() or 1, MOST)


def run(
    tasks: Mapping[str, Task], case: Case, parameters: int, processes: int, prepare: Callable[[], None]
) -> Iterator[Done]:
    """Each task as it is done. `prepare` is called in each new process; whatever is given must be picklable if there is
    more than one. Raises EngineError if a process is killed."""
    if processes == 1:
        with on_one_thread() if parameters <= LARGEST else contextlib.nullcontext():
            for name, task in tasks.items():
                yield _do(name, task, case)
        return
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork wouldn't have
    with ProcessPoolExecutor(processes, context, _begin, (case, prepare)) as pool:
        # The first submission starts all processes.
        with mock.patch.dict(os.environ, ONE_THREAD):
            # The later tasks are the longer ones.
            running = {pool.submit(_do_here, name, task): name for name, task in reversed(tasks.items())}
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise EngineError(
                "a process that ran a check was killed, probably for want of memory; run fewer at once, with --checks"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """PyTorch computes on one thread inside: threads of tiny tensors wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(case: Case, prepare: Callable[[], None]) -> None:
    global _case
    _case = case
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()
    # Tracing makes objects by the million and few cycles: looking for cycles less often saves a tenth of the time.
    gc.set_threshold(100_000)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and its processes would wait for tasks for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do_here(name: str, task: Task) -> Done:
    return _do(name, task, _case)


def _do(name: str, task: Task, case: Case) -> Done:
    start, own = time.perf_counter(), dataclasses.replace(case, evidence={})
    answer = task(own)
    return Done(name, answer, own.evidence, time.perf_counter() - start)
