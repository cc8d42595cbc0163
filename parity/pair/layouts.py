"""Axes of the same value in two models: NCHW here, NHWC there."""

import itertools

import numpy as np

CLOSE = 1e-6


class Layouts:
    """Which order of axes turns a value of one shape into one of another, learned from values that agree."""

    def __init__(self) -> None:
        self._axes: dict[tuple, tuple[int, ...]] = {}

    def learn(self, source: np.ndarray, target: np.ndarray) -> None:
        key = source.shape, target.shape
        if key not in self._axes and (axes := permutation(source, target)) is not None:
            self._axes[key] = axes

    def apply(self, source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
        """`source` in the target's axes, or None if nothing is known of these shapes."""
        axes = self._axes.get((source.shape, shape))
        if axes is not None:
            return np.ascontiguousarray(source.transpose(axes).reshape(shape))
        return source.reshape(shape) if same_but_ones(source.shape, shape) else None


def same_but_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def permutation(source: np.ndarray, target: np.ndarray, close: float = CLOSE) -> tuple[int, ...] | None:
    """The order of the source's axes in which, reshaped, it equals the target; None if there is none."""
    if source.size != target.size or source.ndim > 6:
        return None
    limit = close * max(1e-30, float(np.max(np.abs(target), initial=0.0)))
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        return None
    for axes in itertools.permutations(range(source.ndim)):
        moved = source.transpose(axes).reshape(target.shape)
        if np.abs(moved.ravel()[:64] - target.ravel()[:64]).max(initial=0.0) <= limit and (
            np.abs(moved - target).max(initial=0.0) <= limit
        ):
            return axes
    return None


def orders(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Orders of axes that turn one shape into the other."""
    if len(source) != len(target) or len(source) > 6:
        return []
    return [a for a in itertools.permutations(range(len(source))) if tuple(source[i] for i in a) == target]


def moved(source: np.ndarray, target: tuple[int, ...]) -> list[np.ndarray]:
    """The source in every order of axes that has the target's shape."""
    found = [source.transpose(axes) for axes in orders(source.shape, target)]
    return [*found, source.reshape(target)] if same_but_ones(source.shape, target) else found
