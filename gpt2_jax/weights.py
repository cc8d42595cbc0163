"""Conversion between canonical weights and this package's parameters: the names are the same, and the layout `jax` of
gpt2_core.weights.layouts lists the shapes that differ, and why."""

from collections.abc import Mapping

import jax
import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.weights import Weights
from gpt2_core.weights.layouts import JAX


def from_canonical(weights: Weights, dtype: str) -> dict[str, np.ndarray]:
    """Parameters as numpy arrays of `dtype`."""
    return {n: t.read().astype(dtype) for n, t in JAX.encode(weights.tensors, weights.config).items()}


def to_canonical(
    params: Mapping[str, jax.Array | np.ndarray], config: ModelConfig, source: str, tokenizer: str | None
) -> Weights:
    """Canonical weights from parameters, which may be sharded over devices."""
    return Weights(config, canonical_arrays(params, config), source, tokenizer)


def canonical_arrays(params: Mapping[str, jax.Array | np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters, or anything shaped like them (gradients, moments), in canonical shapes."""
    return {
        name: placement.decode(np.asarray(params[placement.name])) for name, placement in JAX.placements(config).items()
    }
