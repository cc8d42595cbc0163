"""Tasks on one subject in several processes at once: compiling, which is most of what they do, uses one core.

Processes and not threads, because a task switches the compiler's options, float64 and random states for all of one.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gpt2_core.errors import UserError
from parity.suite import Subject

# A task's answer to the subject; its evidence is the subject's.
Task = Callable[[Subject], Any]

# Each process has both frameworks in memory, about a gigabyte.
MOST = 4
# Parameters. Larger models keep every core busy by themselves, and two of them fill the memory; the threads of smaller
# ones wait for each other longer than they compute.
LARGEST = 10_000_000

_subject: Subject


@dataclasses.dataclass(frozen=True)
class Done:
    """A task's name, what it returned and left as evidence, and its seconds."""

    name: str
    answer: Any
    evidence: dict[str, Any]
    seconds: float


def count(subject: Subject, tasks: int, device: str) -> int:
    """In how many processes to run so many tasks; 1 is this one."""
    if device != "cpu" or not _is_small(subject):
        return 1
    return min(tasks, os.cpu_count() or 1, MOST)


def run(tasks: Mapping[str, Task], subject: Subject, processes: int, prepare: Callable[[], None]) -> Iterator[Done]:
    """Each task as it is done. `prepare` is called in each new process; whatever is given must be picklable if there is
    more than one. Raises UserError if a process is killed."""
    if processes == 1:
        from parity.sides import on_one_thread

        with on_one_thread() if _is_small(subject) else contextlib.nullcontext():
            for name, task in tasks.items():
                yield _do(name, task, subject)
        return
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork wouldn't have
    with ProcessPoolExecutor(processes, context, _begin, (subject, prepare)) as pool:
        # The later tasks are the longer ones.
        running = {pool.submit(_do_here, name, task): name for name, task in reversed(tasks.items())}
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that ran a check was killed, probably for want of memory; run fewer at once, with --checks"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_small(subject: Subject) -> bool:
    return subject.weights.config.parameter_count <= LARGEST


def _begin(subject: Subject, prepare: Callable[[], None]) -> None:
    global _subject
    _subject = subject
    prepare()
    import torch

    torch.set_num_threads(1)


def _do_here(name: str, task: Task) -> Done:
    return _do(name, task, _subject)


def _do(name: str, task: Task, subject: Subject) -> Done:
    start, own = time.perf_counter(), dataclasses.replace(subject, evidence={})
    answer = task(own)
    return Done(name, answer, own.evidence, time.perf_counter() - start)
