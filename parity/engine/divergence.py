"""Where two computations part: the first value, in order of computation, that differs beyond rounding."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from parity.suite import SIDES, mismatch, relative_to_largest

Measure = Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Place:
    """A value of the computation, and by how much the sides differ there, relative to its magnitude."""

    name: str
    difference: float
    """Infinite where the two can't be compared, NaN where one isn't finite."""
    note: str = ""
    """What the number doesn't say: shapes, where a NaN is, a constant factor between the two."""


def compare(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    measure: Measure = relative_to_largest,
    sides: tuple[str, str] = SIDES,
) -> list[Place]:
    """Every place, in the order of `ours`, then those that only the other side has; `sides` are their names."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [_place(name, ours.get(name), theirs.get(name), measure, sides) for name in names]


def _place(name: str, ours: np.ndarray | None, theirs: np.ndarray | None, measure: Measure, sides) -> Place:
    if ours is None or theirs is None:
        return Place(name, math.inf, f"missing in {sides[0] if ours is None else sides[1]}")
    if why := mismatch(ours, theirs, sides):
        return Place(name, math.inf, why)
    note = _not_finite({sides[0]: ours, sides[1]: theirs})
    if not note and (factor := _factor(ours, theirs)):
        note = f"{factor:.10g} times as large in {sides[0]} as in {sides[1]}"
    return Place(name, measure(ours, theirs), note)


def _not_finite(arrays: Mapping[str, np.ndarray]) -> str:
    """«JAX has nan at [0, 3], 5 of 64 values aren't finite» for each side that has such values."""
    found = []
    for side, array in arrays.items():
        wrong = np.argwhere(~np.isfinite(array))
        if len(wrong):
            value, index = array[tuple(wrong[0])], wrong[0].tolist()
            found.append(f"{side} has {value} at {index}, {len(wrong)} of {array.size} values aren't finite")
    return "; ".join(found)


# Far above rounding: by how much a factor must differ from 1 to be one, and how constant it must be.
_FACTOR, _CONSTANT = 1e-9, 1e-12


def _factor(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The one factor between all values, if there is one: a wrong count, a sum in the place of a mean."""
    largest = np.abs(theirs).max(initial=0.0)
    if theirs.size < 2 or largest == 0.0:
        return None
    a, b = ours / largest, theirs / largest
    factor = np.vdot(b, a) / np.vdot(b, b)
    constant = np.abs(a - factor * b).max() <= _CONSTANT * abs(factor)
    return float(factor) if constant and abs(factor - 1.0) > _FACTOR else None


def first_beyond(places: Iterable[Place], limit: float) -> str:
    """«block 2, mlp activation: relative difference 3.1e-04; everything before agrees to 2e-16», or the largest
    difference where all stay within the limit."""
    places = list(places)
    before = 0.0
    for number, place in enumerate(places):
        if not place.difference <= limit:
            agrees = f"; everything before agrees to {before:.0e}" if number else ""
            return f"{in_words(place.name)}: {_difference(place)}{agrees}"
        before = max(before, place.difference)
    worst = max(places, key=lambda place: place.difference)
    return f"largest at {in_words(worst.name)}"


def _difference(place: Place) -> str:
    if not math.isfinite(place.difference) and place.note:
        return place.note
    return f"relative difference {place.difference:.1e}" + (f", {place.note}" if place.note else "")


def worst_of(places: Iterable[Place]) -> float:
    differences = [place.difference for place in places]
    return math.nan if np.isnan(differences).any() else max(differences)


def in_words(name: str) -> str:
    """«h.2.mlp.activation» as «block 2, mlp activation», and «first moment of h.2...» likewise."""
    what, of, name = name.rpartition(" of ")
    parts = name.split(".")
    words = f"block {parts[1]}, {' '.join(parts[2:])}" if parts[0] == "h" else " ".join(parts)
    return what + of + words


def backward_order(places: list[str], parameters: list[str]) -> list[str]:
    """Gradients in the order the backward pass makes them: each value's, then its own parameters'."""
    owner: dict[str, list[str]] = {}
    for name in parameters:
        owner.setdefault(_maker(name), []).append(name)
    order = []
    for place in reversed(places):
        order += [place, *owner.pop(place, [])]
    return order + [name for names in owner.values() for name in names]


def _maker(parameter: str) -> str:
    """The place that a parameter takes part in last on the way back."""
    module = parameter.rpartition(".")[0]
    if module.endswith("attn.c_attn") or module.endswith("attn.q_norm"):
        return module.rpartition(".")[0] + ".q"
    if module.endswith("attn.k_norm"):
        return module.rpartition(".")[0] + ".k"
    return {"wte": "embeddings", "wpe": "embeddings", "lm_head": "logits"}.get(module, module)
