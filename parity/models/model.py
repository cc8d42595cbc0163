"""What a comparison asks of a model, whatever framework it is in."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> "Inputs":
        """An array is one argument, a tuple several, a dict has them by keyword."""
        if isinstance(given, Inputs):
            return given
        if isinstance(given, Mapping):
            return cls((), dict(given))
        return cls(given if isinstance(given, tuple) else (given,))

    def as_given(self) -> Any:
        """In the form in which a user gives inputs: what `of` takes."""
        if self.keywords:
            return dict(self.keywords)
        return self.arguments[0] if len(self.arguments) == 1 else self.arguments

    def names(self) -> list[str]:
        return [*(f"input {i}" for i in range(len(self.arguments))), *self.keywords]

    def values(self) -> list[Any]:
        return [*self.arguments, *self.keywords.values()]

    def with_values(self, values: Sequence[Any]) -> "Inputs":
        count = len(self.arguments)
        return Inputs(tuple(values[:count]), dict(zip(self.keywords, values[count:], strict=True)))


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter, or a buffer such as BatchNorm's statistics."""

    name: str
    own: np.ndarray
    """The model's own, in its own type."""
    trained: bool = True
    kept: bool = True
    """Whether it is part of a checkpoint; a table that is computed at construction isn't."""
    frozen: bool = False
    """Whether it is a parameter that training leaves as it is."""

    @property
    def value(self) -> np.ndarray:
        """In float64; made when it is asked for, because models are large."""
        return np.array(self.own, np.float64)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own.shape


_KINDS = {
    "product": {"mm", "bmm", "dot_general", "matmul"},
    "convolution": {"convolution", "conv_general_dilated"},
    "add": {"add", "add_any"},
    "sub": {"sub", "rsub"},
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One computed value and what it is made of.

    `sources` are numbers of earlier values of the same recording; a weight's or an input's value comes first in it.
    """

    number: int
    primitive: str
    """'tanh', 'mm': the operation, by the framework's name."""
    caller: str
    """The library function that the user's line calls, 'gelu'; empty if there is none."""
    place: str
    """The user's line."""
    module: str
    """'layers.0.mlp', where the framework tells."""
    sources: tuple[int, ...]
    layout: bool
    """Whether the operation only moves or repeats numbers."""

    @property
    def primitive_kind(self) -> str:
        """What the primitive does, by one name for both frameworks."""
        plain = self.primitive.rstrip("_")
        return next((kind for kind, names in _KINDS.items() if plain in names), plain)

    def __str__(self) -> str:
        called = self.caller or self.primitive
        name = f"{self.module}: {called}" if self.module else called
        return f"{name} ({self.place})" if self.place else name


@dataclasses.dataclass
class Recording:
    """Every value of one forward pass, in order of computation."""

    values: dict[int, np.ndarray]
    steps: list[Step]
    weights: dict[int, str]
    """Numbers of the values that are weights, and their names."""
    inputs: dict[int, str]
    outputs: list[int]
    """Numbers of the values that the model returns."""
    constants: frozenset[float] = frozenset()
    """Single numbers that the operations are given, as they are written."""

    @functools.cached_property
    def by_number(self) -> dict[int, Step]:
        return {step.number: step for step in self.steps}

    @functools.cached_property
    def from_weights(self) -> set[int]:
        """Numbers of the weights and of the values that are made of weights alone."""
        found = set(self.weights)
        for step in self.steps:
            if step.sources and found.issuperset(step.sources):
                found.add(step.number)
        return found

    @functools.cached_property
    def order_of_use(self) -> list[str]:
        """The weights' names, each where it is used first."""
        order: dict[str, None] = {}
        for step in self.steps:
            order |= dict.fromkeys(self.weights[s] for s in step.sources if s in self.weights)
        return list(order)


@dataclasses.dataclass(frozen=True)
class NarrowCast:
    """A place where a float64 value is rounded to a narrower type."""

    dtype: str
    place: str


@dataclasses.dataclass(frozen=True)
class Trained:
    """A short training."""

    losses: np.ndarray
    """Before each step."""
    after_one: Arrays
    """Parameters after the first step."""


def blank(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that stands for any of its shape and takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Model(Protocol):
    """A model with its weights, computing in float64 on the CPU."""

    framework: str
    """'PyTorch' or 'JAX'."""
    kind: str
    """'torch.nn.Module', 'flax.nnx.Module', ..."""

    def weights(self) -> list[Weight]:
        """In the model's own order; tied ones once, under their first name."""

    def release(self) -> None:
        """Forget its own values: it is only run with others from now on. What the user holds stays as it is."""

    def run(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        """The floating-point outputs of the model as it is written, in float64 where it doesn't ask for less."""

    def gradients(
        self, weights: Arrays, inputs: Inputs, cotangents: Sequence[np.ndarray], of: Collection[str]
    ) -> tuple[Arrays, Arrays]:
        """Of sum(output * cotangent), casts to narrower types lifted: by weight, of those in `of` that can have one,
        and by floating-point input."""

    def run_lifted(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        """The outputs, casts to narrower types lifted."""

    def run_in_float32(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        """The outputs of the model and its inputs in float32."""

    def train(self, weights: Arrays, inputs: Inputs, loss: Any, optimizer: Any, steps: int) -> Trained:
        """Train on one input; the mean square of the first output is the loss where none is given."""

    def state_after(self, weights: Arrays, inputs: Inputs) -> Arrays:
        """Buffers after one call."""

    def record(self, weights: Arrays, inputs: Inputs) -> Recording:
        """Every value of a forward pass, casts to narrower types lifted."""

    def narrow_casts(self, inputs: Inputs) -> list[NarrowCast]:
        """Where the model as it is written rounds to less than float64."""
