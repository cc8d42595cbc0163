"""A mapping by the weights' own values, where both models hold the same ones: two captured runs."""

from collections.abc import Mapping, Sequence

import numpy as np

from parity.models.model import Weight
from parity.pair import candidates
from parity.pair.fingerprints import NEAR, Index
from parity.pair.mapping import Row
from parity.pair.naming import alike
from parity.pair.transforms import Transform

CLOSE = 1e-5
"""Relative: one of the two may have been converted through float32."""


def rows_by_value(source: Mapping[str, Weight], target: Mapping[str, Weight], ignore: Sequence[str]) -> list[Row]:
    """Each weight of the target with the tensor of the source that equals it, transformed; where none does, the most
    alike by name of those that fit, not verified."""
    mine = {n: w.value for n, w in source.items() if n not in ignore}
    names, used, rows = list(mine), set(), []
    index = Index((i, mine[n]) for i, n in enumerate(names))
    shapes = {n: x.shape for n, x in mine.items()}
    for name, weight in target.items():
        if name in ignore:
            continue
        equal = [names[i] for i in index.find(weight.value, NEAR)]
        found = next(_fitting(name, weight.value, equal or names, mine, shapes), None)
        if found is None:
            left = sorted((n for n in names if n not in used), key=lambda n: -alike(name, n))
            guesses = ((n, t) for n in left for t in candidates.one_to_one(shapes[n], weight.value.shape))
            guess = next(guesses, None)
            if guess and alike(name, guess[0]) > 1.0:
                rows.append(Row((guess[0],), guess[1], name, verified=False))
                used.add(guess[0])
            continue
        rows.append(Row(*found, name))
        used.update(found[0])
    return rows


def _fitting(name: str, value: np.ndarray, among: list[str], mine: dict, shapes: dict):
    for n in sorted(among, key=lambda n: -alike(name, n)):
        for kind in (candidates.one_to_one, candidates.part_of, candidates.padded):
            for transform in kind(shapes[n], value.shape):
                if _equal(transform, (mine[n],), value):
                    yield (n,), transform
    for group in candidates.groups(shapes):
        for transform in candidates.of_group(group, shapes, value.shape):
            if _equal(transform, tuple(mine[n] for n in group), value):
                yield group, transform


def _equal(transform: Transform, tensors: tuple, value: np.ndarray) -> bool:
    made = transform(*tensors)
    return bool(np.abs(made - value).max(initial=0.0) <= CLOSE * max(1e-30, np.abs(value).max(initial=0.0)))
