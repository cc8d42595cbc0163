"""What a row of the page is, and how the two results of a row are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import torch

EQUAL = 1e-12  # float64 rounds at 1e-16; what is below differs by rounding alone
DIFFERENT = 1e-6  # what is above differs by its formula; in between lies float32's rounding

# The reference's result and the candidate's. A tuple holds several values; a candidate in a list is one of several.
Pair = tuple[Any, Any]
Claim = Literal["equal", "after", "nearly", "different"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer of PyTorch against its counterpart. The two functions return (reference, candidate) in float64."""

    family: str
    torch: str
    counterpart: str
    framework: str
    as_it_comes: Callable[[], Pair]
    changed: Callable[[], Pair] | None = None
    change: str = ""
    note: str = ""
    claim: Claim = "equal"  # equal as they come; equal after the change; to float32's rounding at best; different

    @property
    def name(self) -> str:
        return f"{self.family}: {self.torch} against {self.counterpart} ({self.framework})"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Largest relative differences of a row; `changed` is None where the row has no change."""

    as_it_comes: float
    changed: float | None

    @property
    def claim(self) -> Claim:
        if self.as_it_comes < EQUAL:
            return "equal"
        if self.changed is not None and self.changed < EQUAL:
            return "after"
        best = self.as_it_comes if self.changed is None else self.changed
        return "nearly" if best < DIFFERENT else "different"


def measure(row: Row) -> Measured:
    """The two differences of a row, computed in float64."""
    with jax.enable_x64(True):
        as_it_comes = difference(*row.as_it_comes())
        changed = None if row.changed is None else difference(*row.changed())
    return Measured(as_it_comes, changed)


def difference(reference: Any, candidate: Any) -> float:
    """Relative to the largest magnitude; infinite for another shape, NaN where one side alone isn't finite."""
    if isinstance(candidate, list):
        return _largest([difference(reference, one) for one in candidate])
    if isinstance(reference, tuple):
        return _largest([difference(a, b) for a, b in zip(reference, candidate, strict=True)])
    a, b = numbers(reference), numbers(candidate)
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a)
    if (finite != np.isfinite(b)).any() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("nan")
    distance, scale = np.abs(a - b)[finite].max(initial=0.0), np.abs(a)[finite].max(initial=0.0)
    return float(distance / scale) if scale else float(distance > 0)


def numbers(array: Any) -> np.ndarray:
    """An array of any framework as one of numpy in float64."""
    if isinstance(array, torch.Tensor):
        array = array.detach().numpy()
    return np.asarray(array, np.float64)


def _largest(values: list[float]) -> float:
    if any(np.isnan(values)):
        return float("nan")
    return max(values)
