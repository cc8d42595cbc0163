"""Statistical tests that random arrays are independent of each other, for masks and initial weights.

A copy, a prefix, a broadcast, a repetition or a shift of the same random numbers is a correlation, either of two arrays
element by element (`aligned`) or of one array with another, or itself, displaced (`displaced`). Arrays given here have
mean 0 and variance 1, and NaN where they have no element. p-values are multiplied by the number of tests made together
(Bonferroni), so that a level is that of all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.fft
import scipy.special

# A sum of fewer products isn't normal enough in the far tail: for masks at rates of 0.3 to 0.7 and for normal values
# the p-value of a thousand is right to a factor of two down to 1e-12.
FEWEST = 1000


def surprise(log_p: np.ndarray, tests: int) -> np.ndarray:
    """-log10 of p-values (given as natural logarithms) that are among `tests` made together; at least 0."""
    return np.maximum(0.0, -(np.asarray(log_p) + np.log(tests)) / np.log(10.0))


def first_surprise(log_p: np.ndarray, what: Sequence[Any], limit: float, tests: int | None = None) -> tuple[float, Any]:
    """The largest surprise of tests made together (None: as many as there are p-values), and of `what` was tested the
    first that is beyond the limit; if none is, the largest."""
    surprises = surprise(log_p, tests or len(what))
    beyond = np.flatnonzero(~(surprises <= limit))
    worst = np.argmax(surprises)
    return float(surprises[worst]), what[int(beyond[0] if len(beyond) else worst)]


def two_sided(z: np.ndarray) -> np.ndarray:
    """Natural logarithms of the two-sided p-values of standard normal scores."""
    return np.log(2.0) + scipy.special.log_ndtr(-np.abs(z))


def aligned(streams: Sequence[np.ndarray]) -> np.ndarray:
    """Scores (N, N) of the correlations of N streams, element by element as far as the shorter of two goes; standard
    normal if they are independent, 0 on the diagonal and where fewer than FEWEST elements meet."""
    values, present = (
        np.zeros((len(streams), max(stream.size for stream in streams)), np.float32) for _ in ("values", "present")
    )
    for row, stream in enumerate(streams):
        flat = stream.ravel()
        values[row, : flat.size], present[row, : flat.size] = np.nan_to_num(flat), ~np.isnan(flat)
    scores = _score(values @ values.T, present @ present.T)
    np.fill_diagonal(scores, 0.0)
    return scores


class Displaceable:
    """An array (S, ...) with its Fourier transforms along the axes after the first, kept for one pair after another."""

    def __init__(self, array: np.ndarray):
        self.shape = array.shape
        self._present, self._values = (~np.isnan(array)).astype(np.float32), np.nan_to_num(array).astype(np.float32)
        self._transforms: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def transforms(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Of the values and of where there are any, padded to `shape`."""
        if shape not in self._transforms:
            axes = tuple(range(1, len(self.shape)))
            self._transforms[shape] = tuple(scipy.fft.rfftn(x, shape, axes) for x in (self._values, self._present))
        return self._transforms[shape]


def displaced(a: Displaceable, b: Displaceable) -> np.ndarray:
    """Scores of the correlations of `a` (S, ...) with `b` (S, ...) displaced by every vector of whole numbers along the
    axes after the first, summed over the first; standard normal if the two are independent, 0 where fewer than FEWEST
    elements meet. The score at the origin of `a` with itself isn't one of independent values.
    """
    shape = tuple(scipy.fft.next_fast_len(m + n - 1, real=True) for m, n in zip(a.shape[1:], b.shape[1:], strict=True))
    sums, counts = (
        scipy.fft.irfftn(np.einsum("s...,s...->...", x, y.conj()), shape)
        for x, y in zip(a.transforms(shape), b.transforms(shape), strict=True)
    )
    return _score(sums, np.rint(counts))


def _score(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.where(counts >= FEWEST, sums / np.sqrt(np.maximum(counts, 1.0)), 0.0)
