"""Between the canonical form and this package's parameters: same names, and two shapes that differ.

| canonical | here | why |
|---|---|---|
| `wte.weight`, `lm_head.weight` (V, D) | (V padded to a multiple of 128, D), zero there | divisible by tensor |
| `c_attn.weight` (D, 3 D), `.bias` (3 D) | (D, 3, D), (3, D) | tensor then splits heads, not the row of q, k, v |
"""

from collections.abc import Mapping

import jax
import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.weights import Weights
from gpt2_jax.model import padded_vocab_size

_PADDED = ("wte.weight", "lm_head.weight")


def from_canonical(weights: Weights, dtype: str) -> dict[str, np.ndarray]:
    """Parameters as numpy arrays of `dtype`."""
    params = {}
    for name, array in weights.arrays.items():
        if name in _PADDED:
            array = np.pad(array, ((0, padded_vocab_size(len(array)) - len(array)), (0, 0)))
        elif ".c_attn." in name:
            array = array.reshape(*array.shape[:-1], 3, -1)
        params[name] = array.astype(dtype)
    return params


def to_canonical(
    params: Mapping[str, jax.Array | np.ndarray], config: ModelConfig, source: str, tokenizer: str | None
) -> Weights:
    """Canonical weights from parameters, which may lie sharded on devices."""
    return Weights(config, canonical_arrays(params, config), source, tokenizer)


def canonical_arrays(params: Mapping[str, jax.Array | np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Parameters, or anything shaped like them (gradients, moments), in canonical shapes."""
    arrays = {}
    for name in config.parameter_shapes:
        array = np.asarray(params[name])
        if name in _PADDED:
            array = array[: config.vocab_size]
        elif ".c_attn." in name:
            array = array.reshape(*array.shape[:-2], -1)
        arrays[name] = array
    return arrays
