"""A JAX function as a flat list of operations that numpy evaluates one by one, each with the user's file and line.

Calls are entered and scans unrolled, so that every intermediate value of the model is a value of the list. Operations
that have no rule in `arithmetic` are evaluated by JAX itself.
"""

import dataclasses
import math
import operator
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from parity.engine.errors import EngineError
from parity.models.arithmetic import RULES
from parity.models.places import is_library, notebook_cell, short_place

MOST_OPERATIONS = 200_000
"""Of an unrolled program: beyond, a scan is too long to be followed value by value."""

# Calls whose body is entered, and the parameter that holds it.
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLS = frozenset({
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call"),
    *("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"),
})  # fmt: skip
# Libraries whose lines are not the user's.
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "haiku", "optax", "jaxtyping", "jmp")


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array of the program itself."""

    value: Any
    exact: float | None = None
    """Of a single number: as the program's author wrote it, before it was rounded to the array's type."""


@dataclasses.dataclass(eq=False)
class Operation:
    """`outputs` are numbers of values; `inputs` are numbers of values or constants."""

    primitive: str
    inputs: list["int | Constant"]
    outputs: list[int]
    params: dict[str, Any]
    place: str
    """The user's line, 'my_model.py:12'."""
    caller: str
    """The library function that the line calls: 'gelu', 'LayerNorm.__call__'; empty if there is none."""
    bind: Callable[..., Any]
    """Evaluates it in JAX."""

    def __str__(self) -> str:
        return f"{self.caller or self.primitive} ({self.place})" if self.place else self.primitive


@dataclasses.dataclass(frozen=True)
class Program:
    """Values are numbered: first the weights, then the inputs, then what the operations compute."""

    weights: list[int]
    inputs: list[int]
    operations: list[Operation]
    outputs: "list[int | Constant]"
    weight_shapes: list[tuple[int, ...]]

    def run(
        self,
        weights: Sequence[np.ndarray],
        inputs: Sequence[np.ndarray],
        *,
        lifted: bool,
        replaced: Mapping[int, np.ndarray] = types.MappingProxyType({}),
    ) -> dict[int, Any]:
        """Every value by its number. `lifted`: what the program computes in a narrower floating-point type is computed
        in float64. `replaced`: values to go on with in place of those that are computed."""
        values: dict[int, Any] = dict(zip(self.weights, weights, strict=True))
        values |= zip(self.inputs, inputs, strict=True)
        for operation in self.operations:
            evaluate(operation, values, lifted=lifted)
            values |= {x: replaced[x] for x in operation.outputs if x in replaced}
        return values

    def lifted_outputs(self, weights: Sequence[np.ndarray], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs, computed in float64; every other value is released after its last use."""
        values: dict[int, Any] = dict(zip(self.weights, weights, strict=True))
        values |= zip(self.inputs, inputs, strict=True)
        last = {x: p for p, o in enumerate(self.operations) for x in o.inputs if not isinstance(x, Constant)}
        kept = {x for x in self.outputs if not isinstance(x, Constant)}
        for position, operation in enumerate(self.operations):
            evaluate(operation, values, lifted=True)
            for x in operation.inputs:
                if not isinstance(x, Constant) and x not in kept and last[x] == position:
                    values.pop(x, None)
        return [read(x, values) for x in self.outputs]

    def of_constants(self) -> dict[int, Any]:
        """The values that depend on neither weights nor inputs, computed in float64."""
        values: dict[int, Any] = {}
        for operation in self.operations:
            if all(isinstance(x, Constant) or x in values for x in operation.inputs):
                evaluate(operation, values, lifted=True)
        return values

    def with_operation(self, position: int, operation: Operation) -> "Program":
        """With another operation in this place."""
        operations = [*self.operations[:position], operation, *self.operations[position + 1 :]]
        return dataclasses.replace(self, operations=operations)

    def with_constants(self, values: Mapping[int, np.ndarray]) -> "Program":
        """With these in place of what is computed for these numbers."""

        def known(x: "int | Constant") -> "int | Constant":
            return Constant(values[x]) if not isinstance(x, Constant) and x in values else x

        operations = [dataclasses.replace(o, inputs=list(map(known, o.inputs))) for o in self.operations]
        outputs = list(map(known, self.outputs))
        return dataclasses.replace(self, operations=_needed(operations, outputs), outputs=outputs)

    def numbers(self) -> frozenset[float]:
        """Its constants that are a single number."""
        return frozenset(read(x, {}).item() for o in self.operations for x in o.inputs if _is_number(x))

    def with_numbers(self, numbers: Collection[float]) -> "Program":
        """With these in place of the constants that they are when they are rounded to float32; itself if there are
        none. What a constant is taken for otherwise (see `lift`) is a guess."""
        tiny, largest = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))  # beyond: 0, infinity
        rounded = {float(np.float32(n)): n for n in numbers if tiny <= abs(n) <= largest}

        def written(x: "int | Constant") -> "int | Constant":
            if not _is_number(x) or x.exact is not None or x.value.item() not in rounded:
                return x
            return x if lift(x.value).item() in numbers else Constant(x.value, rounded[x.value.item()])

        def changed(operation: Operation) -> Operation:
            inputs = list(map(written, operation.inputs))
            same = all(map(operator.is_, inputs, operation.inputs))
            return operation if same else dataclasses.replace(operation, inputs=inputs)

        operations = list(map(changed, self.operations))
        same = all(map(operator.is_, operations, self.operations))
        return self if same else dataclasses.replace(self, operations=operations)

    def traced(self, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The outputs, lifted, by JAX's own operations: what `jax.grad` can differentiate."""
        values: dict[int, Any] = dict(zip(self.weights, weights, strict=True))
        values |= zip(self.inputs, inputs, strict=True)
        for operation in self.operations:
            arguments = [_to_jax(read(x, values)) for x in operation.inputs]
            results = operation.bind(*arguments, **_lifted_params(operation))
            results = results if isinstance(results, list | tuple) else [results]
            values |= zip(operation.outputs, results, strict=True)
        return [_to_jax(read(x, values)) for x in self.outputs]


def read(value: "int | Constant", values: dict[int, Any], lifted: bool = True) -> Any:
    if isinstance(value, Constant):
        if not lifted:
            return value.value
        return lift(value.value) if value.exact is None else np.full(value.value.shape, value.exact)
    return values[value]


def evaluate(operation: Operation, values: dict[int, Any], *, lifted: bool) -> None:
    """Compute the operation's outputs from its inputs, into `values`."""
    arguments = [read(x, values, lifted) for x in operation.inputs]
    rule = RULES.get(operation.primitive)
    with np.errstate(all="ignore"):
        results = rule(*arguments, params=operation.params, lifted=lifted) if rule else NotImplemented
    if results is NotImplemented:
        results = _by_jax(operation, arguments, lifted)
    elif not isinstance(results, list):
        results = [results]
    for number, result in zip(operation.outputs, results, strict=True):
        values[number] = result


def lift(x: Any) -> Any:
    """A constant in float64. What was rounded to a narrower type gets back the digits it was most likely written with:
    the float32 nearest to 1e-6 becomes 1e-6, the one nearest to 2 pi becomes 2 pi."""
    if not is_float(x) or x.size > 64:
        return x.astype(np.float64) if is_float(x) else x
    if x.dtype == np.float64:
        with np.errstate(over="ignore"):
            narrow = x.astype(np.float32)
        if not np.array_equal(narrow, x):
            return x  # it has digits that float32 doesn't have
        x = narrow
    if x.dtype != np.float32:
        return x.astype(np.float64)
    return np.array([_written(v) for v in x.ravel()], np.float64).reshape(x.shape)


def _written(x: np.float32) -> float:
    """The number that was most likely rounded to `x`: short decimals, a root of an integer, a multiple of pi, or the
    inverse of one."""
    decimals, size = float(str(x)), abs(float(x))
    digits = str(abs(x)).partition("e")[0].replace(".", "").strip("0")
    if len(digits) <= 6 or not 1e-6 < size < 1e6:
        return decimals
    for number, made in (
        (size * size, math.sqrt),
        (1 / size**2, lambda n: 1 / math.sqrt(n)),
        (1 / size, lambda n: 1 / n),
        (size / math.pi * 4, lambda n: n * math.pi / 4),
        (math.pi / size, lambda n: math.pi / n),
        (size * size * math.pi, lambda n: math.sqrt(n / math.pi)),
    ):
        whole = round(number)
        if 1 <= whole <= 65536 and np.float32(made(whole)) == np.float32(size):
            return math.copysign(made(whole), x)
    return decimals


def is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, np.floating)


def _is_number(x: "int | Constant") -> bool:
    """Whether it is a constant that is a single floating-point number, in float32 or float64."""
    return isinstance(x, Constant) and is_float(x.value) and x.value.size == 1 and x.value.dtype.kind == "f"


def _by_jax(operation: Operation, arguments: list[Any], lifted: bool) -> list[Any]:
    with jax.enable_x64(True):
        params = _lifted_params(operation) if lifted else operation.params
        results = operation.bind(*map(_to_jax, arguments), **params)
        results = results if isinstance(results, list | tuple) else [results]
        return [_to_numpy(r) for r in results]


def _lifted_params(operation: Operation) -> dict[str, Any]:
    params = dict(operation.params)
    for name in ("preferred_element_type", "dtype", "new_dtype", "out_dtype"):
        if params.get(name) is not None and jax.numpy.issubdtype(params[name], np.floating):
            params[name] = np.dtype(np.float64)
    return params


def _to_jax(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jax.numpy.asarray(x)


def _to_numpy(x: Any) -> Any:
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def flatten(closed: core.ClosedJaxpr, number_of_weights: int) -> Program:
    """The program of a traced function whose first arguments are the weights. Operations that no output needs are left
    out. Raises EngineError if it is longer than MOST_OPERATIONS."""
    builder = _Builder()
    arguments = [builder.new() for _ in closed.jaxpr.invars]
    outputs = builder.enter(closed.jaxpr, closed.consts, arguments, "", "")
    operations = _needed(builder.operations, outputs)
    shapes = [v.aval.shape for v in closed.jaxpr.invars[:number_of_weights]]
    return Program(arguments[:number_of_weights], arguments[number_of_weights:], operations, outputs, shapes)


class _Builder:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._next = 0

    def new(self) -> int:
        self._next += 1
        return self._next - 1

    def enter(self, jaxpr, consts, arguments: list, place: str, caller: str) -> list:
        """The numbers of the results of a (sub)program called with these values."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= zip(jaxpr.constvars, (Constant(_to_host(c)) for c in consts), strict=True)

        def read(atom):
            return _constant(atom) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            here, called = _place(equation)
            # Inside a library's function that is traced once and reused, the line is that of the first call.
            where, by = (place, caller) if place and not here else (here, called)
            results = self._equation(equation, inputs, where, by)
            values |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation, inputs: list, place: str, caller: str) -> list:
        name, params = equation.primitive.name, equation.params
        body = next((params[b] for b in _BODIES if b in params), None)
        if name in _CALLS and body is not None:
            named = params.get("name", "")
            inside = caller or (named if isinstance(named, str) and named != "<lambda>" else "")
            return self.enter(*_open(body), inputs, place, inside)
        if name == "scan":
            return self._unrolled(params, inputs, place, caller)
        primitive = equation.primitive

        def bind(*arguments, **given):
            return primitive.bind(*arguments, **given)

        if primitive.multiple_results and name in ("while", "cond"):
            bind = _compiled(primitive, params)
        return self._record(name, inputs, len(equation.outvars), params, place, caller, bind)

    def _record(self, name, inputs, outputs: int, params, place, caller, bind) -> list[int]:
        numbers = [self.new() for _ in range(outputs)]
        self.operations.append(Operation(name, inputs, numbers, params, place, caller, bind))
        if len(self.operations) > MOST_OPERATIONS:
            raise EngineError(
                f"the JAX model has more than {MOST_OPERATIONS:,} operations when its loops are unrolled; "
                "compare a shorter input or fewer layers"
            )
        return numbers

    def _unrolled(self, params, inputs: list, place: str, caller: str) -> list:
        """A scan, iteration by iteration."""
        constants, carries, length = params["num_consts"], params["num_carry"], params["length"]
        fixed, carry, xs = inputs[:constants], inputs[constants : constants + carries], inputs[constants + carries :]
        order = range(length)[::-1] if params["reverse"] else range(length)
        rows: list[list] = [[None] * length for _ in range(len(params["jaxpr"].jaxpr.outvars) - carries)]
        for i in order:
            slices = [self._record("row", [x], 1, {"index": i}, place, caller, _row)[0] for x in xs]
            results = self.enter(*_open(params["jaxpr"]), [*fixed, *carry, *slices], place, caller)
            carry = results[:carries]
            for row, result in zip(rows, results[carries:], strict=True):
                row[i] = result
        stacked = [self._record("rows", row, 1, {}, place, caller, _rows)[0] for row in rows]
        return [*carry, *stacked]


def _row(x, *, index):
    return x[index]


def _rows(*xs):
    return jax.numpy.stack(xs)


def _compiled(primitive, params):
    """Loops and branches that depend on data stay one operation."""

    def bind(*arguments, **_):
        return jax.jit(lambda *a: primitive.bind(*a, **params))(*arguments)

    return bind


def _open(body) -> tuple:
    return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())


def _to_host(x: Any) -> Any:
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return np.asarray(x)


def _constant(literal) -> Constant:
    value = np.asarray(literal.val, literal.aval.dtype)
    return Constant(value, float(literal.val) if isinstance(literal.val, float) and is_float(value) else None)


def _needed(operations: list[Operation], outputs: Iterable) -> list[Operation]:
    needed = {x for x in outputs if not isinstance(x, Constant)}
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(x for x in operation.inputs if not isinstance(x, Constant))
            kept.append(operation)
    return kept[::-1]


def _place(equation: Any) -> tuple[str, str]:
    """The innermost line that is not a library's, and the library's function that it calls."""
    traceback, called, library = equation.source_info.traceback, "", ""
    for frame in traceback.frames if traceback else ():
        if "/parity/models/" in frame.file_name:
            continue
        # "<string>" and the like are no files that a user knows; IPython in a terminal names its cells so.
        if frame.file_name.startswith("<") and not notebook_cell(frame.file_name):
            continue
        if is_library(frame.file_name, _LIBRARIES):
            called, library = _shorter(frame.function_name), frame.file_name
            continue
        return short_place(frame.file_name, frame.line_num), called if library else ""
    return "", called


def _shorter(function: str) -> str:
    """The name that a user calls it by; empty for a library's inner workings."""
    parts = [p for p in function.split(".") if p not in ("<locals>", "<lambda>", "__call__")]
    if any(p.startswith("_") or "wrap" in p or "reraise" in p or p in ("op", "fun") for p in parts):
        return ""
    return ".".join(parts[-2:])
