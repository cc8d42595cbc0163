"""Out-of-memory errors, with a suggested batch size.

A planner is a function of (sequences at once on a device, accumulation) that gives the bytes a step needs there; each
framework has its own, which asks its compiler or runs the step on tensors without values.
"""

import ctypes
import dataclasses
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from gpt2_core.config import ResolvedConfig
from gpt2_core.errors import UserError

Planner = Callable[[int, int], int]

# The memory limit of a container in Linux, in both versions of control groups.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def out_of_memory(
    config: ResolvedConfig, planner: Planner, *, num_shards: int, available: int, device: str
) -> UserError:
    """The error for a step of `config` that doesn't fit on one of the `num_shards` devices that share its batch."""
    asked = config.microbatch_size // num_shards
    tokens = f"{asked} sequences of {config.tokens_per_sequence} tokens at once"
    needed = planner(asked, config.accumulation)
    given = f"--batch_size {config.batch_size} with --accumulation {config.accumulation}: " + (
        f"{tokens} on each of {num_shards} devices" if num_shards > 1 else tokens
    )
    words = f"out of memory: {given} need about {_gigabytes(needed)}, and there are {_gigabytes(available)} on {device}"
    fits = largest_fit(lambda n: planner(n, config.accumulation), available, below=asked, needed_below=needed)
    if fits:
        choices = [f"--batch_size {fits * num_shards * config.accumulation}"]
        accumulation = _smallest_accumulation(config, planner, num_shards, available, fits)
        choices += [] if accumulation is None else [f"--accumulation {accumulation}"]
        return UserError(f"{words}; expected to fit: {' or '.join(choices)}")
    return UserError(
        f"{words}; not even one sequence fits: use a smaller model or --sequence_length, or with gpt2 train --remat "
        "true or a --mesh with fsdp"
    )


def check_state(config: ResolvedConfig, *, num_shards: int, available: int, device: str) -> None:
    """Raise UserError if a model's parameters and AdamW's moments don't fit on one of the `num_shards` devices that
    share them: making them would end the process, on a CPU without an error."""
    count = config.model.parameter_count
    needed = 3 * count * (8 if config.precision == "float64" else 4) // num_shards
    if needed > available:
        each = f" on each of {num_shards} devices" if num_shards > 1 else ""
        raise UserError(
            f"out of memory: the model's {count:,} parameters and the optimizer's state need {_gigabytes(needed)}{each}"
            f", and there are {_gigabytes(available)} on {device}; use a smaller model, or with gpt2 train a --mesh "
            "with more fsdp"
        )


def largest_fit(needed: Callable[[int], int], available: int, *, below: int, needed_below: int) -> int:
    """The largest n under `below` whose `needed(n)` is at most `available`, or 0; `needed` grows with n.

    A call costs a compilation: n is interpolated, and checked. Where `needed` isn't quite linear, the n found fits, and
    a slightly larger one might too.
    """
    low, needed_low, high, needed_high = 1, needed(1), below, needed_below
    if needed_low > available or below <= 1:
        return 0
    while high - low > 1:
        slope = max(1, (needed_high - needed_low) // (high - low))
        guess = min(low + (available - needed_low) // slope, high - 1)
        if guess == low:
            return low
        needed_guess = needed(guess)
        if needed_guess <= available:
            return guess
        high, needed_high = guess, needed_guess
    return low


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or the container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [path.read_text(encoding="ascii").strip() for path in LIMITS if path.is_file()]
    return min([physical, *(int(text) for text in found if text.isdigit())])


def keep_freed_memory() -> None:
    """Stop glibc returning freed memory to the operating system; best called early.

    A step on CPU allocates its temporaries again each time, many megabytes in one piece. By default glibc maps and
    unmaps each of them, and the kernel fills every page with zeros when it is first touched: a quarter of the time of a
    small model's step in JAX, a tenth of GPT-2's in either framework.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads, or each keeps its own
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large allocation
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is returned


def peak_memory() -> int:
    """Bytes of this process's largest resident set since it began."""
    if sys.platform == "linux":
        # What getrusage calls a process's largest set may be that of the process that started it.
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _smallest_accumulation(
    config: ResolvedConfig, planner: Planner, num_shards: int, available: int, fits: int
) -> int | None:
    """The fewest parts, more than asked for, that the batch can be computed in and that fit."""
    sequences = config.batch_size // num_shards
    for accumulation in range(config.accumulation + 1, sequences + 1):
        # More than one part needs a buffer for the sum of their gradients, so what fits may be less than `fits`.
        at_once = sequences // accumulation
        if sequences % accumulation == 0 and at_once <= fits and planner(at_once, accumulation) <= available:
            return accumulation
    return None


def of_batch(config: ResolvedConfig, sequences: int, accumulation: int) -> ResolvedConfig:
    """The configuration with another batch, of so many sequences at once."""
    return dataclasses.replace(
        config,
        batch_size=sequences * accumulation,
        accumulation=accumulation,
        batch_tokens=None,
        device_batch_size=None,
    )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB"
