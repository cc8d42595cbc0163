"""Weights in which every tensor matters: no bias is zeros and no norm's scale is ones, which would hide mistakes."""

from collections.abc import Collection, Iterable

import numpy as np

from parity.models.model import Arrays, Weight


def draw(weights: Iterable[Weight], rng: np.random.Generator, tables: Collection[str] = ()) -> Arrays:
    """Random values of the weights' shapes. Tables, those named and those that are computed at construction, keep their
    own."""
    return {w.name: _one(w, rng) if w.kept and w.name not in tables else w.value for w in weights}


def _one(weight: Weight, rng: np.random.Generator) -> np.ndarray:
    own, shape = weight.own, weight.shape
    noise = rng.standard_normal(shape)
    last = weight.name.rpartition(".")[2].lower()
    if not weight.trained and last not in ("running_mean", "running_var", "mean", "var"):
        return weight.value  # a mask, a table of positions
    if "var" in last:
        return np.abs(weight.value) * np.exp(0.3 * noise)  # a variance stays positive
    if own.ndim >= 2:
        fan_in = max(1, int(np.prod(shape[1:])))
        # Embeddings of a unit scale, products that keep it.
        if _spread(own):
            noise /= np.sqrt(fan_in)
            return noise
    return weight.value + 0.2 * noise


def _spread(own: np.ndarray) -> bool:
    """Whether the tensor was drawn at random, and isn't a constant, or a table with a meaning."""
    return bool(own.size and np.ptp(own) > 0 and abs(own.mean(dtype=np.float64)) < own.std(dtype=np.float64))
