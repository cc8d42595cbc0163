"""Sampling from a model: the options, and the uniform random numbers, which are a sampler's only randomness.

Each framework has its own sampler, a function of logits and uniform numbers, with this definition:

1. divide the logits by the temperature and order them from the largest (equal ones by token id);
2. top-k: keep the first k;
3. top-p (nucleus, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751): with the probabilities of what is left,
   keep a token while the probabilities before it add up to less than p, so the one that crosses p is kept;
4. renormalise, and take the first token at which the cumulative probability exceeds the uniform number.

Greedy takes the largest logit.

A context longer than the model's block is cut to its last `block_size` tokens; when a growing context is full, its
last half is kept (`fit_context`), so that generation can continue without limit at a bounded cost.
"""

import dataclasses
import math

import numpy as np

from gpt2_core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises UserError for settings out of range. A temperature of 0 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.temperature == 0:
            object.__setattr__(self, "greedy", True)  # the limit, which neither sampler divides by
        elif not 1e-3 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: must be 0.001 or more, or 0 for the most likely token (--greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k}: must be 1 or more")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")


def uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """The uniform numbers in [0, 1) of one sample, float64 of shape (count,): a function of (seed, sample) alone."""
    return np.random.default_rng([seed, sample]).random(count)


def fit_context(ids: list[int], block_size: int, *, growing: bool) -> list[int]:
    """The part of a context that the model sees: all of it if it fits in the block, else its end (see above)."""
    if len(ids) <= block_size:
        return ids
    return ids[-max(1, block_size // 2) :] if growing else ids[-block_size:]
