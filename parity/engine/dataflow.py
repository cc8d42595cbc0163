"""A traced JAX program as one graph of values, so that what it computes in which dtype can be asked of the program."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Primitives that move numbers, add them up or scale them: what precedes them has to be as exact as what follows.
LAYOUT = frozenset({
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "dynamic_update_slice"),
    *("optimization_barrier", "pad", "reshape", "rev", "slice", "split", "squeeze", "stack", "stop_gradient"),
    "transpose",
})  # fmt: skip
ELEMENTWISE = LAYOUT | {"add", "add_any", "div", "max", "min", "mul", "neg", "select_n", "sub"}


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program. A loop's carry and the result of a branch have several makers."""

    shape: tuple[int, ...]
    dtype: Any
    makers: list["Operation"] = dataclasses.field(default_factory=list)

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def is_narrow(self) -> bool:
        """Whether it has less than float32's precision."""
        return self.is_float and jnp.finfo(self.dtype).nmant < jnp.finfo(jnp.float32).nmant

    def __str__(self) -> str:
        made = f" from {self.makers[0]}" if self.makers else ""
        return f"{np.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]{made}"


@dataclasses.dataclass(eq=False)
class Operation:
    primitive: str
    operands: list[Value]
    results: list[Value]
    params: dict[str, Any]
    place: str
    """The function of the project that asked for it."""

    def __str__(self) -> str:
        return f"{self.primitive} in {self.place}" if self.place else self.primitive


@dataclasses.dataclass(frozen=True)
class Graph:
    """Calls, branches and loops are entered: an operation of a loop's body is there once."""

    inputs: list[Value]
    outputs: list[Value]
    operations: list[Operation]

    def values(self) -> Iterator[Value]:
        yield from self.inputs
        for operation in self.operations:
            yield from operation.results


def trace(function: Callable, *arguments: Any) -> Graph:
    """The graph of `function(*arguments)`; inputs and outputs are in the order of `jax.tree.leaves`."""
    closed = jax.make_jaxpr(function)(*arguments)
    inputs = [_value(v) for v in closed.jaxpr.invars]
    operations: list[Operation] = []
    outputs = _enter(closed, inputs, operations)
    return Graph(inputs, outputs, operations)


def before(value: Value, through: Collection[str]) -> Iterator[Value]:
    """`value` and the values it is made of, walking back through these primitives and stopping at any other."""
    yield from _closure([value], lambda v: (o for made in v.makers if made.primitive in through for o in made.operands))


def after(graph: Graph, values: Iterable[Value], through: Collection[str]) -> list[Value]:
    """The values and what these primitives make of them."""
    users: dict[int, list[Operation]] = {}
    for operation in graph.operations:
        for operand in operation.operands:
            users.setdefault(id(operand), []).append(operation)
    return list(
        _closure(values, lambda v: (r for o in users.get(id(v), ()) if o.primitive in through for r in o.results))
    )


def _closure(values: Iterable[Value], follow: Callable[[Value], Iterable[Value]]) -> Iterator[Value]:
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += follow(value)


def _value(var: Any) -> Value:
    return Value(tuple(getattr(var.aval, "shape", ())), getattr(var.aval, "dtype", np.dtype(bool)))


def _enter(closed: Any, inputs: list[Value], into: list[Operation]) -> list[Value]:
    """Add a jaxpr's operations, its inputs being these values; gives its outputs."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: _value(v) for v in jaxpr.constvars}

    def read(atom: Any) -> Value:
        return _value(atom) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        operands, results = list(map(read, equation.invars)), list(map(_value, equation.outvars))
        known |= zip(equation.outvars, results, strict=True)
        _add(equation, operands, results, into)
    return list(map(read, jaxpr.outvars))


def _add(equation: Any, operands: list[Value], results: list[Value], into: list[Operation]) -> None:
    name, params = equation.primitive.name, equation.params
    inner = [x for p in params.values() for x in (p if isinstance(p, tuple) else (p,)) if _is_jaxpr(x)]

    def copy(origins: list[Value], copies: list[Value]) -> None:
        for origin, result in zip(origins, copies, strict=True):
            _record(Operation("copy", [origin], [result], {}, ""), into)

    if name == "cond":
        for branch in params["branches"]:
            copy(_enter(branch, operands[1:], into), results)
    elif name == "scan":
        consts, carries = params["num_consts"], params["num_carry"]
        entered = list(map(_value, params["jaxpr"].jaxpr.invars))
        copy(operands, entered)
        outputs = _enter(params["jaxpr"], entered, into)
        copy(outputs[:carries], entered[consts : consts + carries])
        copy(outputs, results)
    elif name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        carries = operands[sum(consts) :]
        entered = list(map(_value, params["body_jaxpr"].jaxpr.invars[consts[1] :]))
        copy(carries, entered)
        outputs = _enter(params["body_jaxpr"], operands[consts[0] : sum(consts)] + entered, into)
        _enter(params["cond_jaxpr"], operands[: consts[0]] + entered, into)
        copy(outputs, entered)
        copy(outputs, results)
    elif len(inner) == 1 and len(_invars(inner[0])) == len(operands) and len(_outvars(inner[0])) == len(results):
        # A call: jit, custom_vjp, checkpoint, shard_map.
        copy(_enter(inner[0], operands, into), results)
    else:
        for each in inner:  # what a reduction does with two elements
            _enter(each, list(map(_value, _invars(each))), into)
        _record(Operation(name, operands, results, params, _place(equation)), into)


def _record(operation: Operation, into: list[Operation]) -> None:
    into.append(operation)
    for result in operation.results:
        result.makers.append(operation)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def _invars(x: Any) -> list:
    return getattr(x, "jaxpr", x).invars


def _outvars(x: Any) -> list:
    return getattr(x, "jaxpr", x).outvars


def _place(equation: Any) -> str:
    """'attention.py, _weights': the innermost function that is neither JAX's nor Flax's."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if "site-packages" not in frame.file_name and not frame.file_name.startswith("<"):
            return f"{frame.file_name.rpartition('/')[2]}, {frame.function_name}"
    return ""
