"""The canonical form of a GPT-2's weights: GPT-2's own names and orientation, as Hugging Face stores them."""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's configuration and its parameters, by canonical name, as numpy arrays.

    Linear weights have the shape (in, out); the query, key and value projections lie side by side in that order
    in `c_attn`; the head is `wte.weight`. Float32, or bfloat16 for weights published so, or float64 from runs in
    float64. Raises UserError if a parameter is missing, unknown, of the wrong shape or dtype, or not finite.
    """

    config: ModelConfig
    arrays: Mapping[str, np.ndarray]
    source: str = "weights"
    """Where they come from, for messages."""
    tokenizer: str | None = None
    """Name of the tokenizer they were trained with, where it is known."""

    def __post_init__(self) -> None:
        shapes = self.config.parameter_shapes
        if missing := [name for name in shapes if name not in self.arrays]:
            raise UserError(f"{self.source}: {_some(missing)} missing; a GPT-2 of this size has {len(shapes)} tensors")
        if unknown := [name for name in self.arrays if name not in shapes]:
            raise UserError(f"{self.source}: {_some(unknown)} not part of this GPT-2")
        for name, array in self.arrays.items():
            if array.shape != shapes[name]:
                raise UserError(
                    f"{self.source}: {name} has the shape {array.shape}; this configuration needs {shapes[name]}"
                )
            if array.dtype not in DTYPES:
                raise UserError(f"{self.source}: {name} is {array.dtype}; expected float32, bfloat16 or float64")
            if not np.isfinite(array).all():
                raise UserError(f"{self.source}: {name} has values that are not finite (NaN or infinity)")

    def astype(self, dtype: np.dtype | type) -> "Weights":
        return dataclasses.replace(self, arrays={n: a.astype(dtype) for n, a in self.arrays.items()})


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
