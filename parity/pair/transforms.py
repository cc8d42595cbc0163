"""Transforms of tensors between two models' layouts, as text that people can edit: 'transpose | reshape(64, 4, 16)'.

A transform takes one tensor, or several (to concatenate, stack or add). All are linear, so gradients map as values do.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from parity.engine.errors import EngineError

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of step: what it does to arrays, and how to take it back where that is possible."""

    apply: Callable[..., Array]
    undo: Callable[..., Array] | None
    """Of (result, shape of the argument, *numbers)."""
    several: bool = False
    """Whether it takes all tensors at once; it comes first then."""


def _chunk(x: Array, number: int, count: int, axis: int) -> Array:
    return np.split(x, count, axis)[number]


def _interleaved(x: Array, number: int, count: int, width: int) -> Array:
    """Of rows in groups (group, count, width): the rows of one of `count` fused tensors."""
    return x.reshape(-1, count, width, *x.shape[1:])[:, number].reshape(-1, *x.shape[1:])


def _add_first(xs: Sequence[Array], number: int, count: int) -> Array:
    """The first tensor, and in the first `number` of `count` parts of it the second one too."""
    whole, more = xs
    end = len(whole) * number // count
    return np.concatenate([whole[:end] + more[:end], whole[end:]])


def _pad(x: Array, rows: int) -> Array:
    return np.pad(x, [(0, rows), *[(0, 0)] * (x.ndim - 1)])


KINDS: dict[str, Kind] = {
    "transpose": Kind(lambda x: x.T, lambda y, shape: y.T),
    "permute": Kind(lambda x, *axes: x.transpose(axes), lambda y, shape, *axes: y.transpose(np.argsort(axes))),
    "reshape": Kind(lambda x, *shape: x.reshape(shape), lambda y, before, *shape: y.reshape(before)),
    "flip": Kind(lambda x, *axes: np.flip(x, axes), lambda y, shape, *axes: np.flip(y, axes)),
    "chunk": Kind(_chunk, None),
    "interleaved": Kind(_interleaved, None),
    "pad": Kind(_pad, lambda y, shape, rows: y[: len(y) - rows]),
    "row": Kind(lambda x, index: x[index], None),
    "concat": Kind(lambda xs, axis: np.concatenate(xs, axis), None, several=True),
    "stack": Kind(lambda xs, axis: np.stack(xs, axis), None, several=True),
    # Takes what follows to each tensor by itself, and stacks the results: the layers of a scan.
    "each": Kind(lambda xs: np.stack(xs), None, several=True),
    "add": Kind(lambda xs: sum(xs[1:], start=xs[0]), None, several=True),
    # The biases of a GRU: those of two gates are sums, that of the third is the first tensor's.
    "add_first": Kind(_add_first, None, several=True),
}
"""Further kinds can be registered: KINDS["negate"] = Kind(lambda x: -x, lambda y, shape: -y)."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Steps one after the other; none is the identity."""

    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __call__(self, *tensors: Array) -> Array:
        """Raises EngineError if the tensors don't fit the steps."""
        steps = list(self.steps)
        if steps and steps[0][0] == "each":
            return np.stack([Transform(self.steps[1:])(t) for t in tensors])
        try:
            if steps and KINDS[steps[0][0]].several:
                name, numbers = steps.pop(0)
                x = KINDS[name].apply(list(tensors), *numbers)
            else:
                (x,) = tensors
            for name, numbers in steps:
                x = KINDS[name].apply(x, *numbers)
        except (ValueError, IndexError) as error:
            shapes = ", ".join(str(t.shape) for t in tensors)
            raise EngineError(f"the transform {self} doesn't fit tensors of shape {shapes}: {error}") from error
        return x

    def gradient(self, *tensors: Array) -> Array:
        """What the transform makes of gradients: as of values, but both terms of a sum have the sum's gradient."""
        if self.adds:
            return Transform(self.steps[1:])(tensors[0])
        return self(*tensors)

    @property
    def adds(self) -> bool:
        return bool(self.steps) and self.steps[0][0] in ("add", "add_first")

    def can_undo(self) -> bool:
        return all(KINDS[name].undo for name, _ in self.steps)

    def undo(self, y: Array, shape: Sequence[int]) -> Array:
        """The tensor of this shape that the transform makes `y` of."""
        shapes, x = [], np.empty(shape)
        for name, numbers in self.steps:
            shapes.append(x.shape)
            x = KINDS[name].apply(x, *numbers)
        for (name, numbers), before in zip(reversed(self.steps), reversed(shapes), strict=True):
            y = KINDS[name].undo(y, before, *numbers)
        return y

    def then(self, name: str, *numbers: int) -> "Transform":
        return Transform((*self.steps, (name, tuple(numbers))))

    @property
    def form(self) -> str:
        """Its kinds of steps, without sizes: what siblings have in common."""
        return " | ".join(f"{name}{numbers}" if name in ("permute", "flip") else name for name, numbers in self.steps)

    @property
    def turn(self) -> str:
        """How it orders axes, all else left out: 'transpose', '' for as they are."""
        turns = [f"{n}{list(a)}" if a else n for n, a in self.steps if n in ("transpose", "permute", "flip")]
        return " | ".join(turns)

    def __str__(self) -> str:
        if not self.steps:
            return "identity"
        return " | ".join(
            f"{name}({', '.join(map(str, numbers))})" if numbers else name for name, numbers in self.steps
        )


def parse(text: str) -> Transform:
    """Read what str() of a transform wrote; raises EngineError for anything else."""
    if text.strip() in ("identity", ""):
        return Transform()
    steps = []
    for part in text.split("|"):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\(([-\d\s,]*)\))?\s*", part)
        if match is None or match[1] not in KINDS:
            raise EngineError(f"transform {text!r}: {part.strip()!r} is unknown; steps are {', '.join(KINDS)}")
        steps.append((match[1], tuple(int(n) for n in (match[2] or "").split(",") if n.strip())))
    return Transform(tuple(steps))
