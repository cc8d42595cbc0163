"""What a check yields, what becomes of its exceptions, how arrays are measured, and which failure explains others."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np


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


Check = Callable[..., Iterator[Result | Skipped]]

# Of the case that an exception makes: how many there were, and how many may be.
EXCEPTIONS = "exceptions"


def guarded(
    name: str,
    check: Check,
    *,
    packages: Collection[str] = (),
    passes: type[Exception] | tuple[type[Exception], ...] = (),
) -> Check:
    """A check that ends in a failed result where `check` raises an exception or compares nothing.

    What came before the exception is kept. The result counts the exception: one measured, none allowed; its `where` has
    the message and the innermost line of one of the `packages`. Exceptions of the classes `passes` go through.
    """

    def run(*arguments) -> Iterator[Result | Skipped]:
        last = None
        try:
            for last in check(*arguments):
                yield last
        except passes:
            raise
        except Exception as error:
            after = f"; after {last.case}" if isinstance(last, Result) else ""
            yield Result(name, EXCEPTIONS, 1.0, 0.0, in_words(error, packages) + after)
            return
        if last is None:
            yield Result(name, "cases left out", 1.0, 0.0, "the check compared nothing")

    return run


_LONGEST = 300  # characters of a message; XLA's can be pages


def in_words(error: Exception, packages: Collection[str] = ()) -> str:
    """'ValueError: the message (gpt2_jax/model.py:12)': the innermost line of one of the packages, given by name."""
    message = " ".join(str(error).split())
    message = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
    lines = [
        f"{_short(frame.f_code.co_filename)}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] in packages
    ]
    return f"{type(error).__name__}{': ' * bool(message)}{message}" + (f" ({lines[-1]})" if lines else "")


def _short(file: str) -> str:
    path, root = Path(file), Path(__file__).parents[2]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def explanation(results: Iterable[Result], rests_on: Mapping[str, Collection[str]]) -> str:
    """Which of the checks that failed explains the others; nothing if all passed. `rests_on` says of each check what it
    computes with that another check compares by itself: if both fail, the other one explains this one."""
    first: dict[str, Result] = {}
    for result in results:
        if not result.passed:
            first.setdefault(result.check, result)
    sentences = []
    for name, result in first.items():
        if _foundations(name, rests_on) & first.keys():
            continue
        resting = [other for other in first if name in _foundations(other, rests_on)]
        then = f"; what failed in {', '.join(resting)} rests on it" if resting else ""
        sentences.append(f"look first at {name}, {result.case}: {result.where or 'see its figures'}{then}")
    return "; ".join(sentences)


def _foundations(name: str, rests_on: Mapping[str, Collection[str]]) -> set[str]:
    """Everything that a check rests on, however indirectly."""
    direct = set(rests_on.get(name, ()))
    return direct.union(*(_foundations(other, rests_on) for other in direct))


def mismatch(ours: np.ndarray, theirs: np.ndarray, names: tuple[str, str]) -> str:
    """Why two arrays can't be compared by their values: shapes or dtypes differ; "" where they can. numpy would make
    their shapes equal by repeating the smaller one. `names` are those of the two sides."""
    for what in ("shape", "dtype"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if a != b:
            return f"{what} {a} in {names[0]}, {b} in {names[1]}"
    return ""


def relative_to_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite if shapes or dtypes differ, NaN if a value isn't
    finite."""
    return _relative(ours, theirs, lambda x: float(np.max(np.abs(x), initial=0.0)))


def relative_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm; infinite or NaN likewise."""
    return _relative(ours, theirs, lambda x: float(np.linalg.norm(x)))


def _relative(ours: np.ndarray, theirs: np.ndarray, size: Callable[[np.ndarray], float]) -> float:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return math.inf
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.nan
    return size(ours - theirs) / (size(theirs) or 1.0)
