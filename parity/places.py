"""Where two computations part: the first value, in order of computation, that differs beyond rounding."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from parity.suite import relative_to_largest


@dataclasses.dataclass(frozen=True)
class Place:
    """A value of the computation, and by how much the sides differ there, relative to its largest magnitude."""

    name: str
    difference: float


def compare(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> list[Place]:
    """Every place, in the order of `ours`."""
    return [Place(name, relative_to_largest(ours[name], theirs[name])) for name in ours]


def first_beyond(places: list[Place], limit: float) -> str:
    """«block 2, mlp activation: relative difference 3.1e-04; everything before agrees to 2e-16», or the largest
    difference where all stay within the limit."""
    before = 0.0
    for number, place in enumerate(places):
        if not place.difference <= limit:
            agrees = f"; everything before agrees to {before:.0e}" if number else ""
            return f"{in_words(place.name)}: relative difference {place.difference:.1e}{agrees}"
        before = max(before, place.difference)
    worst = max(places, key=lambda place: place.difference)
    return f"largest at {in_words(worst.name)}"


def worst_of(places: list[Place]) -> float:
    differences = [place.difference for place in places]
    return float("nan") if np.isnan(differences).any() else max(differences)


def in_words(name: str) -> str:
    """«h.2.mlp.activation» as «block 2, mlp activation»."""
    parts = name.split(".")
    if parts[0] == "h":
        return f"block {parts[1]}, {' '.join(parts[2:])}"
    return " ".join(parts)


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
