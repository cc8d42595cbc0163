"""What a check is, and how the checks are run.

The two sides share the configuration, the canonical names and arrays of the weights, and the batches of token ids.
Everything else, from the embedding to the sampler, each computes with code of its own.
"""

import contextlib
import dataclasses
import importlib
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_core.errors import UserError
from gpt2_core.weights import Weights

Level = Literal["quick", "default", "full"]

# Every check, in the order they run; each is the module of parity that bears its name.
CHECKS = (
    "weights",
    "initialization",
    "forward",
    "gradients",
    "optimizer",
    "schedule",
    "loss_curve",
    "dropout",
    "mesh",
    "precision",
    "generation",
    "trainer",
    "variants",
    "settings",
    "sizes",
    "combinations",
)


# These compare the programs that training compiles. In the others LLVM's optimisations are off: they take half of the
# time, and what is computed there is the same formulas in other combinations.
COMPILED_AS_TRAINED = ("forward", "gradients", "loss_curve", "precision")

# What each check computes with that another check compares by itself. If both fail, the other one explains this one.
RESTS_ON: dict[str, tuple[str, ...]] = {
    "weights": (),
    "initialization": (),
    "forward": ("weights",),
    "gradients": ("forward",),
    "optimizer": ("gradients",),
    "schedule": ("optimizer",),
    "loss_curve": ("optimizer", "schedule"),
    "dropout": ("loss_curve",),
    "mesh": ("loss_curve",),
    "precision": ("gradients",),
    "generation": ("forward",),
    "trainer": ("loss_curve", "generation"),
    "variants": ("loss_curve",),
    "settings": ("optimizer", "dropout"),
    "sizes": ("weights", "gradients", "generation"),
    "combinations": ("dropout", "mesh", "generation", "variants"),
}


# What no check looks at, or none has the power to see; the page of --prove says it beside what was caught.
CANNOT_SEE = (
    "a mistake that both sides make alike in what they share: the configuration, the canonical names and the tokenizer",
    "kernels for GPUs (cuDNN's attention, the Triton layer norm) on a CPU; with --device gpu `precision` compares them",
    "a dropout rate that is wrong by less than 0.3 percentage points at one site",
    "by the numbers alone, a residual stream in bfloat16, and a softmax in bfloat16 on small random weights: only the "
    "traced program shows them",
    "training on several hosts",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured case. `where` names the first value that differs beyond the limit, or says what was seen.

    `measured` is infinite where two arrays can't be compared (a shape, a dtype, a name that only one side has), NaN
    where a value isn't finite. An exception is a case of its own (see `guarded`).
    """

    check: str
    case: str
    measured: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.limit)  # a NaN fails


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A check, or one case of it, that doesn't apply here, and why."""

    check: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared: one set of weights on both sides, on real text."""

    weights: Weights
    tokens: np.ndarray
    """Ids of the text, shape (T,)."""
    level: Level = "default"
    steps: int | None = None
    """Length of the loss curve; None: what the level says."""
    seed: int = 0
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the checks leave for the report to draw, by a name of their own."""

    def at(self, quick: Any, default: Any, full: Any | None = None) -> Any:
        """The one of these that belongs to the level."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.level]


Check = Callable[[Subject], Iterator[Result | Skipped]]

# Of the case that an exception makes: how many there were, and how many may be.
EXCEPTIONS = "exceptions"


def load(name: str) -> Check:
    """The check called `name`, guarded. Loaded late: a wrong name is refused before two frameworks are imported."""

    def check(subject: Subject) -> Iterator[Result | Skipped]:
        module = importlib.import_module(f"parity.{name}")
        from parity.compiling import compiled_quickly

        with contextlib.nullcontext() if name in COMPILED_AS_TRAINED else compiled_quickly():
            yield from module.check(subject)

    return guarded(name, check)


def guarded(name: str, check: Check, *, typed: str = "") -> Check:
    """A check that ends in a failed result where `check` raises an exception or compares nothing.

    What came before the exception is kept. The result counts the exception: one measured, none allowed; its `where` has
    the message and the innermost line of this repository. Where the check does what the user typed, `typed` is that: a
    module's name, whose lines are named too; a UserError is then the user's, and passes.
    """

    def run(subject: Subject) -> Iterator[Result | Skipped]:
        last = None
        try:
            for last in check(subject):
                yield last
        except Exception as error:
            if typed and isinstance(error, UserError):
                raise
            after = f"; after {last.case}" if isinstance(last, Result) else ""
            yield Result(name, EXCEPTIONS, 1.0, 0.0, in_words(error, typed) + after)
            return
        if last is None:
            yield Result(name, "cases left out", 1.0, 0.0, "the check compared nothing")

    return run


_PACKAGES = ("gpt2_core", "gpt2_jax", "gpt2_torch", "parity")
_LONGEST = 300  # characters of a message; XLA's can be pages


def in_words(error: Exception, module: str = "") -> str:
    """«ValueError: the message (gpt2_jax/model.py:12)»: the innermost line of this repository, or of the module."""
    message = " ".join(str(error).split())
    message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
    lines = [
        f"{_short(frame.f_code.co_filename)}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] in (*_PACKAGES, module.partition(".")[0])
    ]
    return f"{type(error).__name__}{': ' * bool(message)}{message}" + (f" ({lines[-1]})" if lines else "")


def _short(file: str) -> str:
    path, root = Path(file), Path(__file__).parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def explanation(results: Iterable[Result]) -> str:
    """Which of the checks that failed explains the others, by RESTS_ON; nothing if all passed."""
    first: dict[str, Result] = {}
    for result in results:
        if not result.passed:
            first.setdefault(result.check, result)
    sentences = []
    for name, result in first.items():
        if _foundations(name) & first.keys():
            continue
        resting = [other for other in first if name in _foundations(other)]
        then = f"; what failed in {', '.join(resting)} rests on it" if resting else ""
        sentences.append(f"look first at {name}, {result.case}: {result.where or 'see its figures'}{then}")
    return "; ".join(sentences)


def _foundations(name: str) -> set[str]:
    """Everything that a check rests on, however indirectly."""
    direct = set(RESTS_ON.get(name, ()))
    return direct.union(*map(_foundations, direct))


SIDES = ("JAX", "PyTorch")


def mismatch(ours: np.ndarray, theirs: np.ndarray, sides: tuple[str, str] = SIDES) -> str:
    """Why two arrays can't be compared by their values: shapes or dtypes differ; "" where they can. numpy would make
    their shapes equal by repeating the smaller one."""
    for what in ("shape", "dtype"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if a != b:
            return f"{what} {a} in {sides[0]}, {b} in {sides[1]}"
    return ""


def relative_to_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite if shapes or dtypes differ, NaN if a value isn't
    finite."""
    return _relative(ours, theirs, lambda x: float(np.max(np.abs(x), initial=0.0)))


def relative_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm; infinite or NaN likewise."""
    return _relative(ours, theirs, lambda x: float(np.linalg.norm(x)))


def _relative(ours: np.ndarray, theirs: np.ndarray, size: Callable[[np.ndarray], float]) -> float:
    if mismatch(ours, theirs):
        return math.inf
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.nan
    return size(ours - theirs) / (size(theirs) or 1.0)
