"""Small changes of a program, one operation at a time: what a careless port would have got wrong.

Used to see what a comparison would notice (the mutation score) and whether it names the changed line.
"""

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.models.program import Constant, Operation, Program, evaluate, is_float, read


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The operation at `position` replaced by another one with the same outputs."""

    position: int
    story: str
    operation: Operation
    original: Operation

    @property
    def place(self) -> str:
        return self.operation.place

    def at(self, here: Operation, values: dict[int, Any]) -> "Mutant":
        """The same change of the same operation in the program of another input, where values have other numbers."""
        if here is self.original:
            return self
        for story, changed in _changes(here, values):
            if story == self.story:
                return dataclasses.replace(self, operation=changed, original=here)
        raise LookupError(self.story)


# An operation for another one that looks like it.
_SWAPS = {
    "add": "sub",
    "sub": "add",
    "mul": "div",
    "div": "mul",
    "max": "min",
    "min": "max",
    "sin": "cos",
    "cos": "sin",
    "tanh": "erf",
    "erf": "tanh",
    "logistic": "tanh",
    "exp": "expm1",
    "lt": "le",
    "le": "lt",
    "gt": "ge",
    "ge": "gt",
    "sqrt": "cbrt",
    "reduce_max": "reduce_min",
    "square": "abs",
}


def mutants(program: Program, values: dict[int, Any]) -> list[Mutant]:
    """Every change there is of the program whose values these are."""
    found = []
    for position, operation in enumerate(program.operations):
        for story, changed in _changes(operation, values):
            found.append(Mutant(position, story, changed, operation))
    return found


def _changes(operation: Operation, values: dict[int, Any]) -> Iterator[tuple[str, Operation]]:
    name, inputs = operation.primitive, operation.inputs
    arguments = [read(x, values) for x in inputs]
    if (other := _SWAPS.get(name)) and all(getattr(a, "dtype", None) is not None for a in arguments):
        params = (
            {"accuracy": None} if name in ("tanh", "erf", "logistic", "exp", "sqrt", "sin", "cos") else operation.params
        )
        yield f"{other} in place of {name}", dataclasses.replace(operation, primitive=other, params=params)
    if name in ("add", "mul", "sub", "div") and is_float(arguments[0]):
        for i in (0, 1):
            kept = arguments[i]
            if np.shape(kept) == np.shape(values[operation.outputs[0]]) and not isinstance(inputs[i], Constant):
                yield (
                    f"{name} left out",
                    dataclasses.replace(operation, primitive="copy", inputs=[inputs[i]], params={}),
                )
                break
    for i, x in enumerate(inputs):
        if isinstance(x, Constant) and np.ndim(x.value) == 0 and name not in ("pad", "gather", "scatter"):
            yield from _other_constants(operation, i, np.asarray(x.value))
    yield from _by_kind(operation, arguments)


def _other_constants(operation: Operation, i: int, value: np.ndarray) -> Iterator[tuple[str, Operation]]:
    def with_constant(new):
        inputs = list(operation.inputs)
        inputs[i] = Constant(np.asarray(new, value.dtype))
        return dataclasses.replace(operation, inputs=inputs)

    if value.dtype.kind == "f" and np.isfinite(value) and value != 0:
        if abs(value) < 1e-2:
            yield f"{value:g} ten times as large", with_constant(value * 10)
        elif abs(value) < 1e6:
            yield f"{value:g} changed to {float(value) * 1.25:g}", with_constant(value * 1.25)
    elif value.dtype.kind in "iu":
        yield f"{value} changed to {value + 1}", with_constant(value + 1)


def _by_kind(operation: Operation, arguments: list[Any]) -> Iterator[tuple[str, Operation]]:
    name, params = operation.primitive, operation.params

    def with_params(**changed):
        return dataclasses.replace(operation, params={**params, **changed})

    if name == "dot_general":
        (left, right), batch = params["dimension_numbers"]
        b = arguments[1]
        free = [d for d in range(b.ndim) if d not in (*right, *batch[1])]
        if len(right) == 1 and len(free) == 1 and b.shape[right[0]] == b.shape[free[0]]:
            yield "the second factor transposed", with_params(dimension_numbers=((left, tuple(free)), batch))
    elif name == "transpose":
        axes, shape = list(params["permutation"]), np.shape(arguments[0])
        for i in range(len(axes)):
            for j in range(i):
                if shape[axes[i]] == shape[axes[j]] > 1:
                    changed = list(axes)
                    changed[i], changed[j] = axes[j], axes[i]
                    yield f"axes {axes[j]} and {axes[i]} swapped", with_params(permutation=tuple(changed))
    elif name in ("reduce_sum", "reduce_max") and len(params["axes"]) == 1:
        (axis,), shape = params["axes"], np.shape(arguments[0])
        for other in range(len(shape)):
            if other != axis and shape[other] == shape[axis] > 1:
                yield f"axis {other} in place of {axis}", with_params(axes=(other,))
    elif name == "slice":
        starts, limits, shape = params["start_indices"], params["limit_indices"], np.shape(arguments[0])
        for i in range(len(shape)):
            if limits[i] < shape[i]:
                yield (
                    "a slice one further",
                    with_params(start_indices=_plus_one(starts, i), limit_indices=_plus_one(limits, i)),
                )
    elif name == "concatenate" and len(operation.inputs) == 2 and np.shape(arguments[0]) == np.shape(arguments[1]):
        yield "parts in the other order", dataclasses.replace(operation, inputs=operation.inputs[::-1])
    elif name == "split" and len(set(params["sizes"])) == 1 and len(operation.outputs) > 1:
        yield (
            "parts in another order",
            dataclasses.replace(operation, outputs=[*operation.outputs[1:], operation.outputs[0]]),
        )
    elif name == "integer_pow":
        yield f"power {params['y'] + 1} in place of {params['y']}", with_params(y=params["y"] + 1)
    elif name == "select_n" and len(arguments) == 3:
        yield (
            "the cases of a selection swapped",
            dataclasses.replace(operation, inputs=[operation.inputs[0], operation.inputs[2], operation.inputs[1]]),
        )
    elif name == "conv_general_dilated":
        padding = params["padding"]
        for i, (low, high) in enumerate(padding):
            if low > 0 or high > 0:
                step = 1 if high > 0 else -1
                changed = [(a + step, b - step) if j == i else (a, b) for j, (a, b) in enumerate(padding)]
                yield "padding one further", with_params(padding=tuple(changed))
    elif name in ("cumsum", "cumlogsumexp", "cummax", "cumprod"):
        yield "in the other direction", with_params(reverse=not params["reverse"])
    elif name == "iota" and not operation.inputs:
        yield "counted from one", dataclasses.replace(operation, primitive="iota_from_one")
    elif name == "argmax":
        yield "argmin in place of argmax", dataclasses.replace(operation, primitive="argmin")


def _plus_one(numbers, i: int) -> tuple[int, ...]:
    return tuple(n + (j == i) for j, n in enumerate(numbers))


class Runner:
    """Evaluates mutants of one program from where they differ."""

    def __init__(self, program: Program, values: dict[int, Any]) -> None:
        self.program, self.values = program, values
        self._users: dict[int, list[int]] = defaultdict(list)
        for position, operation in enumerate(program.operations):
            for x in operation.inputs:
                if not isinstance(x, Constant):
                    self._users[x].append(position)

    def changed(self, mutant: Mutant) -> dict[int, Any] | None:
        """The values that differ with the mutant in place; None if it can't be evaluated."""
        found: dict[int, Any] = {}
        both = _Both(found, self.values)
        queue, seen = [mutant.position], set()
        while queue:
            position = heapq.heappop(queue)
            if position in seen:
                continue
            seen.add(position)
            operation = mutant.operation if position == mutant.position else self.program.operations[position]
            try:
                evaluate(operation, both, lifted=True)
            except Exception:
                return None
            for x in operation.outputs:
                if np.shape(found[x]) != np.shape(self.values[x]):
                    return None
                if _same_bits(found[x], self.values[x]):
                    del found[x]
                    continue
                for user in self._users[x]:
                    heapq.heappush(queue, user)
        return found

    def outputs(self, changed: dict[int, Any]) -> list[np.ndarray]:
        both = _Both(changed, self.values)
        return [read(x, both) for x in self.program.outputs]


class _Both(dict):
    """Changed values before the unchanged."""

    def __init__(self, changed: dict[int, Any], values: dict[int, Any]) -> None:
        super().__init__()
        self._changed, self._values = changed, values

    def __getitem__(self, key: int) -> Any:
        return self._changed[key] if key in self._changed else self._values[key]

    def __setitem__(self, key: int, value: Any) -> None:
        self._changed[key] = value

    def __contains__(self, key: object) -> bool:
        return key in self._changed or key in self._values


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return False
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
