"""What a check is, and how the checks are run.

The two sides share the configuration, the canonical names and arrays of the weights, and the batches of token ids.
Everything else, from the embedding to the sampler, each computes with code of its own.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from gpt2_core.weights import Weights

Level = Literal["quick", "default", "full"]

# Every check, in the order they run; each is the module of parity that bears its name.
CHECKS = (
    "weights",
    "initialization",
    "forward",
    "gradients",
    "schedule",
    "optimizer",
    "loss_curve",
    "dropout",
    "mesh",
    "precision",
    "generation",
    "variants",
    "settings",
    "sizes",
    "combinations",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One measured case. `where` names the place of the first or largest difference, or says what was seen."""

    check: str
    case: str
    measured: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.limit)  # a NaN fails


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A check, or one case of it, that doesn't apply here, and why."""

    check: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared: one set of weights on both sides, on real text."""

    weights: Weights
    tokens: np.ndarray
    """Ids of the text, shape (T,)."""
    level: Level = "default"
    steps: int | None = None
    """Length of the loss curve; None: what the level says."""
    seed: int = 0
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the checks leave for the report to draw, by a name of their own."""

    def at(self, quick: Any, default: Any, full: Any | None = None) -> Any:
        """The one of these that belongs to the level."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.level]


Check = Callable[[Subject], Iterator[Result | Skipped]]


def load(name: str) -> Check:
    """The check called `name`. Loaded late, so that a wrong name is refused before two frameworks are imported."""
    return importlib.import_module(f"parity.{name}").check


def relative_to_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude; NaN wherever one side has a value that isn't finite."""
    largest = np.max(np.abs(theirs))
    return float(np.max(np.abs(ours - theirs)) / (largest if largest > 0 else 1.0))


def relative_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    norm = np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs) / (norm if norm > 0 else 1.0))
