"""Where two computations diverge: the first value, in order of computation, that differs beyond rounding."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from parity.engine.results import mismatch, relative_to_largest

Measure = Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A value of the computation, and by how much the two sides differ there, relative to its magnitude."""

    name: str
    difference: float
    """Infinite where the two can't be compared, NaN where one isn't finite."""
    note: str = ""
    """What the number doesn't say: shapes, where a NaN is, a constant factor between the two."""


def compare(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    names: tuple[str, str],
    measure: Measure = relative_to_largest,
) -> list[Divergence]:
    """Every value, in the order of `ours`, then those that only the other side has; `names` are those of the sides."""
    values = [*ours, *(name for name in theirs if name not in ours)]
    return [_divergence(value, ours.get(value), theirs.get(value), measure, names) for value in values]


def _divergence(
    name: str, ours: np.ndarray | None, theirs: np.ndarray | None, measure: Measure, names: tuple[str, str]
) -> Divergence:
    if ours is None or theirs is None:
        return Divergence(name, math.inf, f"missing in {names[0] if ours is None else names[1]}")
    if why := mismatch(ours, theirs, names):
        return Divergence(name, math.inf, why)
    difference = measure(ours, theirs)
    if difference <= _SMALL:
        return Divergence(name, difference)
    note = _not_finite(zip(names, (ours, theirs), strict=True))
    if not note and (factor := _factor(ours, theirs)):
        note = f"{factor:.10g} times as large in {names[0]} as in {names[1]}"
    return Divergence(name, difference, note)


def _not_finite(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """'JAX has nan at [0, 3], 5 of 64 values aren't finite' for each side that has such values."""
    found = []
    for side, array in arrays:
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            value, index = array[tuple(wrong[0])], wrong[0].tolist()
            found.append(f"{side} has {value} at {index}, {len(wrong)} of {array.size} values aren't finite")
    return "; ".join(found)


# A difference up to here needs no note, whose search takes longer than the comparison.
_SMALL = 1e-11

# Far above rounding: by how much a factor must differ from 1 to be one, and how constant it must be.
_FACTOR, _CONSTANT = 1e-9, 1e-12


def _factor(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The one factor between all values, if there is one: a wrong count, a sum instead of a mean."""
    largest = np.abs(theirs).max(initial=0.0)
    if theirs.size < 2 or largest == 0.0:
        return None
    a, b = ours / largest, theirs / largest
    factor = np.vdot(b, a) / np.vdot(b, b)
    constant = np.abs(a - factor * b).max() <= _CONSTANT * abs(factor)
    return float(factor) if constant and abs(factor - 1.0) > _FACTOR else None


def first_beyond(found: Iterable[Divergence], limit: float, in_words: Callable[[str], str] = str) -> str:
    """'block 2, mlp activation: relative difference 3.1e-04; everything before agrees to 2e-16', or the largest
    difference where all stay within the limit. `in_words` says a value's name for people."""
    found = list(found)
    before = 0.0
    for number, divergence in enumerate(found):
        if not divergence.difference <= limit:
            agrees = f"; everything before agrees to {before:.0e}" if number else ""
            return f"{in_words(divergence.name)}: {_difference(divergence)}{agrees}"
        before = max(before, divergence.difference)
    worst = max(found, key=lambda divergence: divergence.difference)
    return f"largest at {in_words(worst.name)}"


def _difference(divergence: Divergence) -> str:
    if not math.isfinite(divergence.difference) and divergence.note:
        return divergence.note
    return f"relative difference {divergence.difference:.1e}" + (f", {divergence.note}" if divergence.note else "")


def worst_of(found: Iterable[Divergence]) -> float:
    """The largest difference; NaN if there is one."""
    differences = [divergence.difference for divergence in found]
    return math.nan if np.isnan(differences).any() else max(differences)
