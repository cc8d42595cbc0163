"""Check `initialization`: both frameworks' own initialisers draw from the distributions GPT-2 prescribes."""

import math
from collections.abc import Iterator

import jax
import numpy as np
import torch

import gpt2_torch.model
from gpt2_core.config import ModelConfig
from gpt2_jax.model import Execution, define
from gpt2_jax.weights import canonical_arrays as jax_arrays
from gpt2_torch.weights import canonical_arrays as torch_arrays
from parity.suite import Result, Subject

# -log10 of the probability that the right distribution looks at least this unlikely: 1e-6 for each test. With two
# tests for each of some hundred tensors, a right initialiser fails one run in several thousand.
LIMIT = 6.0


def check(subject: Subject) -> Iterator[Result]:
    config = subject.weights.config
    for side, draw in (("JAX", _jax), ("PyTorch", _torch)):
        arrays = draw(config, subject.seed)
        scores = {name: _surprise(array, *_prescribed(name, config)) for name, array in arrays.items()}
        worst = max(scores, key=scores.__getitem__)
        case = f"{side}: mean and standard deviation of {len(scores)} tensors, -log10 p"
        yield Result("initialization", case, scores[worst], LIMIT, f"least likely: {worst}")


def _prescribed(name: str, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation (Radford et al. 2019; the code published with it)."""
    if name.endswith(".bias"):
        return 0.0, 0.0
    if ".ln_" in f".{name}" or "_norm." in name:
        return 1.0, 0.0
    if name.endswith("c_proj.weight"):
        return 0.0, 0.02 / math.sqrt(2 * config.n_layer)
    return 0.0, 0.02


def _surprise(array: np.ndarray, mean: float, deviation: float) -> float:
    """-log10 of the smaller p-value of a z-test of the mean and a chi-square test of the variance."""
    values = array.astype(np.float64).ravel()
    if deviation == 0.0:
        return 0.0 if (values == mean).all() else math.inf
    n = values.size
    z_mean = (values.mean() - mean) / (deviation / math.sqrt(n))
    chi_square = ((values - mean) ** 2).sum() / deviation**2
    # Wilson & Hilferty 1931: the cube root of chi-square over its degrees of freedom is nearly normal.
    z_variance = ((chi_square / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))
    p = min(math.erfc(abs(z) / math.sqrt(2)) for z in (z_mean, z_variance))
    return -math.log10(max(p, 1e-300))


def _jax(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    definition = define(config, Execution("float32"))
    return jax_arrays(jax.jit(definition.initialize)(jax.random.key(seed)), config)


def _torch(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    return torch_arrays(gpt2_torch.model.GPT2(config).state_dict(), config)
