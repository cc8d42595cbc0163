"""The outputs of two models: which belong together, and by how much they differ."""

import math
from collections.abc import Sequence

import numpy as np

from parity.engine.results import relative_norm, relative_to_largest
from parity.models.model import Recording
from parity.pair import layouts

SAME = 1e-10
"""Largest difference of an output, relative to its largest magnitude. Correct ones measure 1e-15, deep ones 1e-13."""


def of_recording(recording: Recording) -> list[np.ndarray]:
    return [np.asarray(recording.values[n]) for n in recording.outputs]


def paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Outputs in their order, those of equal size."""
    left, pairs = list(range(len(ours))), []
    for j, y in enumerate(theirs):
        for i in left:
            if ours[i].size == y.size:
                pairs.append((i, j))
                left.remove(i)
                break
    return pairs


def lacking(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[int]:
    """Which of their outputs have none of ours of equal size."""
    there = {j for _, j in paired(ours, theirs)}
    return [j for j in range(len(theirs)) if j not in there]


def worst(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference of all; infinite if one of their outputs has no counterpart, NaN if a value is."""
    if lacking(ours, theirs):
        return math.inf
    return float(np.max([difference(ours[i], theirs[j]) for i, j in paired(ours, theirs)], initial=0.0))


def norm(ours: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """The norm of the difference over the norm, of all outputs together: the largest difference is a single value's."""
    together = np.concatenate([np.ravel(x) for x in ours]), np.concatenate([np.ravel(x) for x in exact])
    return relative_norm(*together)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the largest magnitude, axes in the order in which they agree best if the shapes differ."""
    if ours.shape == theirs.shape:
        return relative_to_largest(ours, theirs)
    axes = layouts.permutation(theirs, ours, SAME)
    if axes is not None:
        return relative_to_largest(ours, theirs.transpose(axes).reshape(ours.shape))
    moved = layouts.moved(theirs, ours.shape)
    return min((relative_to_largest(ours, m) for m in moved), default=math.inf)


def where_finite(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with zeros where neither is finite (zeros divided by zeros in both); unchanged if only one of them isn't."""
    finite = np.isfinite(theirs)
    if ours.shape != theirs.shape or not np.array_equal(finite, np.isfinite(ours)):
        return ours, theirs
    return np.where(finite, ours, 0.0), np.where(finite, theirs, 0.0)


def is_one_number(output: np.ndarray) -> bool:
    """Whether an output of several elements has the same everywhere, so that it can't show a difference."""
    return output.size > 1 and bool((output == output.flat[0]).all())
