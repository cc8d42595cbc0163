"""What a check is, and how the checks are run.

The two sides share the configuration, the canonical names and arrays of the weights, and the batches of token ids.
Everything else, from the embedding to the sampler, each computes with code of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from gpt2_core.weights import Weights


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured case. `where` names the place of the largest or first difference, or says what was seen."""

    check: str
    case: str
    measured: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.limit)  # a NaN fails


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared: one set of weights on both sides, on real text."""

    weights: Weights
    tokens: np.ndarray
    """Ids of the text, shape (T,)."""
    steps: int
    """Length of the loss curve."""
    prompts: int
    new_tokens: int
    seed: int = 0


Check = Callable[[Subject], Iterator[Result]]


def checks() -> dict[str, Check]:
    """Every check by its name, in the order they run."""
    from parity import forward, generation, gradients, loss_curve, weights

    modules = (weights, forward, gradients, loss_curve, generation)
    return {module.__name__.rpartition(".")[2]: module.check for module in modules}


def relative_to_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def relative_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
