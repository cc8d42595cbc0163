"""This project's own two GPT-2s as a pair for `parity`, and what its comparison would miss.

    python -m parity compare own_gpt2:make_torch own_gpt2:make_jax --inputs own_gpt2:inputs --mutants 200
    GPT2_PRESET=gpt2 python -m parity compare own_gpt2:make_torch own_gpt2:make_jax --inputs own_gpt2:inputs

in this folder: a small model, or one of the presets.
"""

import dataclasses
import os

import numpy as np

from gpt2_core.config import PRESETS, ModelConfig
from gpt2_core.weights import Weights
from parity.gpt2.cases import SMALL, random_weights


def config() -> ModelConfig:
    preset = os.environ.get("GPT2_PRESET")
    # The small model is long enough for several blocks of queries in the JAX model's attention.
    return ModelConfig(**PRESETS[preset], block_size=64) if preset else dataclasses.replace(SMALL, block_size=300)


def weights() -> Weights:
    return random_weights(config())


def make_torch():
    """`gpt2_torch`'s module."""
    from gpt2_torch.weights import build

    return build(weights())


def make_jax():
    """`gpt2_jax`'s model as the function of its parameters that training differentiates."""
    from gpt2_jax.definition import define
    from gpt2_jax.model import Execution
    from gpt2_jax.weights import from_canonical

    definition = define(config(), Execution("float64", "xla"))
    return (lambda params, tokens_BT: definition.merge(params)(tokens_BT)), from_canonical(weights(), "float32")


def inputs() -> np.ndarray:
    """Token ids (2, block size)."""
    model = config()
    return np.random.default_rng(0).integers(0, model.vocab_size, (2, model.block_size))
