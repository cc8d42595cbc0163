"""Weights in which every tensor matters: no bias of zeros and no norm of ones for a mistake to hide behind."""

from collections.abc import Iterable

import numpy as np

from parity.models.model import Arrays, Weight


def draw(weights: Iterable[Weight], rng: np.random.Generator) -> Arrays:
    """Random values of the weights' shapes. Tables that are computed at construction keep their own."""
    return {w.name: _one(w, rng) if w.kept else w.value for w in weights}


def _one(weight: Weight, rng: np.random.Generator) -> np.ndarray:
    own, shape = weight.value, weight.value.shape
    noise = rng.standard_normal(shape)
    last = weight.name.rpartition(".")[2].lower()
    if not weight.trained and last not in ("running_mean", "running_var", "mean", "var"):
        return own  # a mask, a table of positions
    if "var" in last:
        return np.abs(own) * np.exp(0.3 * noise)  # a variance stays positive
    if own.ndim >= 2:
        fan_in = max(1, int(np.prod(shape[1:])))
        # Embeddings of a unit scale, products that keep it.
        return noise / np.sqrt(fan_in) if _spread(own) else own + 0.2 * noise
    return own + 0.2 * noise


def _spread(own: np.ndarray) -> bool:
    """Whether the tensor was drawn at random, and isn't a constant, or a table with a meaning."""
    return bool(own.size and (np.ptp(own) > 0) and abs(own.mean()) < own.std())
