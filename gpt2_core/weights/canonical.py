"""The canonical form of a GPT-2's weights: GPT-2's own names and orientation, as Hugging Face stores them."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float64": np.dtype(np.float64)}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        """The tensor of this `shape` that `change` computes from this one when it is read."""
        return LazyTensor(shape, self.dtype, lambda: change(self.read()))

    def astype(self, dtype: np.dtype) -> "LazyTensor":
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name, each read again when it is asked for: a model passes through memory one tensor at a time."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's configuration and its parameters, by canonical name, as numpy arrays.

    Linear weights have the shape (in, out); the query, key and value projections lie side by side in that order
    in `c_attn`; the head is `wte.weight`. Float32, or bfloat16 for weights published so, or float64 from runs in
    float64. Raises UserError if a parameter is missing, unknown, or of the wrong shape or dtype.
    """

    config: ModelConfig
    arrays: Mapping[str, np.ndarray]
    """In memory, or `LazyArrays`."""
    source: str = "weights"
    """Where they come from, for messages."""
    tokenizer: str | None = None
    """Name of the tokenizer they were trained with, where it is known."""
    notes: tuple[str, ...] = ()
    """What a reader had to assume, for the user to know."""

    def __post_init__(self) -> None:
        check_tensors(self.tensors, self.config.parameter_shapes, self.source)

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The parameters' shapes and dtypes, without reading any that isn't in memory."""
        if isinstance(self.arrays, LazyArrays):
            return self.arrays.tensors
        return {n: LazyTensor(a.shape, a.dtype, lambda a=a: a) for n, a in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def astype(self, dtype: np.dtype | type) -> "Weights":
        return dataclasses.replace(self, arrays={n: a.astype(dtype) for n, a in self.arrays.items()})

    def in_memory(self) -> "Weights":
        """The same, read and ready to compute with; raises UserError naming a tensor that isn't finite."""
        arrays = {}
        for name in self.arrays:
            array = self.arrays[name]
            if not np.isfinite(array).all():
                raise UserError(f"{self.source}: {name} has values that are not finite (NaN or infinity)")
            arrays[name] = array
        return dataclasses.replace(self, arrays=arrays)


def check_tensors(found: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise UserError unless `found` has the tensors of `shapes`, all and no other, in a dtype that is known."""
    if missing := [name for name in shapes if name not in found]:
        raise UserError(f"{source}: {_some(missing)} missing; a GPT-2 of this size has {len(shapes)} tensors")
    if unknown := [name for name in found if name not in shapes]:
        raise UserError(f"{source}: {_some(unknown)} not part of this GPT-2")
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise UserError(f"{source}: {name} has the shape {tensor.shape}; this configuration needs {shapes[name]}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{source}: {name} is {tensor.dtype}; expected {', '.join(DTYPES)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
