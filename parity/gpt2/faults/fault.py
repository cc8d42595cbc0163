"""What a planted mistake is, and how a function becomes one.

    @fault("post-norm", check="forward", place="block 0", seam=(gpt2_jax.model.Block, "__call__"))
    def post_norm(call):
        \"\"\"GPT-1's order: the norm after the addition.\"\"\"

        def wrong(self, x, branch, positions, **options): ...

        return wrong

The function gets what is right, an attribute of a module or class of the models, and returns what is planted instead;
its docstring is the story of the mistake. A seam is of this project, and never of a framework: what it stands for has a
name there. A mistake of several attributes has no `seam`: its function plants it by itself, as a context manager's
generator.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from gpt2_core.config import ModelConfig
from parity.gpt2.suite import PACKAGES

# The smallest model on which most of them show: one layer, two heads.
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)

Patch = Callable[[], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake, who makes it, and the check and the place that must find it."""

    name: str
    story: str
    check: str
    place: str
    """Part of the failing case's name or of its `where`."""
    part: str | None
    """The part of the check that is run, where it has parts and the others take long; None: all of them."""
    patch: Patch
    model: ModelConfig
    """The architecture it shows in."""
    prepare: Callable[[str, np.ndarray], np.ndarray]
    """Changes the weights so that the mistake shows."""

    def __reduce__(self):
        # Its functions can't be sent to another process; its name can.
        return _called, (self.name,)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one fault."""

    fault: Fault
    caught: bool
    in_place: bool
    orders: float
    """Orders of magnitude by which the failing case exceeds its limit; the least of them in the right place."""
    where: str


REGISTERED: dict[str, Fault] = {}
"""Every fault whose file has been imported, by name."""


def _called(name: str) -> Fault:
    # A new process hasn't imported the files.
    from parity.gpt2.faults import FAULTS

    return next(fault for fault in FAULTS if fault.name == name)


def fault(
    name: str,
    *,
    check: str,
    place: str,
    part: str | None = None,
    seam: tuple[Any, str] | None = None,
    model: ModelConfig = MODEL,
    prepare: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array,
) -> Callable[[Callable], Callable]:
    """Register the decorated function as a fault; raises ValueError for a name that is taken, a missing story, or a
    seam that isn't of this project."""

    def register(plant: Callable) -> Callable:
        if name in REGISTERED or not plant.__doc__:
            raise ValueError(f"fault {name!r}: needs a name of its own and a docstring")
        if seam is not None and (package := _package(seam[0])) not in PACKAGES:
            raise ValueError(
                f"fault {name!r}: replaces {seam[1]} of {package}; expected a seam of {', '.join(PACKAGES)}"
            )
        patch = contextlib.contextmanager(plant) if seam is None else replacing(*seam, plant)
        story = " ".join(inspect.cleandoc(plant.__doc__).split())
        REGISTERED[name] = Fault(name, story, check, place, part, patch, model, prepare)
        return plant

    return register


def _package(target: Any) -> str:
    return (target.__name__ if inspect.ismodule(target) else target.__module__).partition(".")[0]


def replacing(target: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Put `make(original)` where an attribute was."""
    return lambda: mock.patch.object(target, name, make(getattr(target, name)))
