"""JAX models of every kind: NNX, Linen, Equinox and Haiku modules, and plain functions of (parameters, inputs).

Each is reduced to one function of its floating-point arrays and the inputs; the rest works on that function's jaxpr.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.engine.errors import EngineError
from parity.engine.results import in_words as in_one_line
from parity.models import program as programs
from parity.models.model import Arrays, Inputs, NarrowCast, Recording, Step, Trained, Weight, blank
from parity.models.program import Constant, Program

LAYOUT = frozenset({
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims"),
    *("gather", "optimization_barrier", "pad", "reduce_precision", "reshape", "rev", "row", "rows", "slice", "split"),
    *("squeeze", "stop_gradient", "transpose"),
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Definition:
    """A model as a function: `apply(arrays, inputs)` returns (outputs, state after the call by name)."""

    kind: str
    names: list[str]
    arrays: list[np.ndarray]
    trained: list[bool]
    apply: Callable[[Sequence[Any], Inputs], tuple[Any, dict[str, Any]]]


jax.tree_util.register_dataclass(Inputs, data_fields=["arguments", "keywords"], meta_fields=[])


class JaxModel:
    framework = "JAX"

    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self.kind = definition.kind
        self._programs: dict[Any, tuple[Program, Callable | None]] = {}
        self._tables: dict[Any, list[NarrowCast]] = {}
        self._written: frozenset[float] = frozenset()
        self._compiled = jax.jit(lambda arrays, inputs: self._outputs(arrays, inputs)[0])

    def weights(self) -> list[Weight]:
        d = self._definition
        return [Weight(name, array, trained) for name, array, trained in zip(d.names, d.arrays, d.trained, strict=True)]

    def release(self) -> None:
        arrays = [blank(a.shape, a.dtype) for a in self._definition.arrays]
        self._definition = dataclasses.replace(self._definition, arrays=arrays)

    def run(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        """Compiled by XLA, as the user's own program would be; in float32 where the model can't be traced in
        float64."""
        _, ladder = self._program(inputs)
        if ladder is None:
            return self.run_in_float32(weights, inputs)
        with ladder():
            outputs = self._compiled([jnp.asarray(w) for w in self._ordered(weights)], _traced(inputs))
        return [np.asarray(x, np.float64) for x in outputs]

    def gradients(
        self, weights: Arrays, inputs: Inputs, cotangents: Sequence[np.ndarray], of: Collection[str]
    ) -> tuple[Arrays, Arrays]:
        program, order = self.program(inputs), self._definition.names
        values = arrays_of(inputs)
        numbers = [i for i, x in enumerate(values) if programs.is_float(x)]

        def loss(wanted, chosen, others, cotangents):
            filled, arrays = list(values), wanted | others
            for number, x in zip(numbers, chosen, strict=True):
                filled[number] = x
            outputs = program.traced([arrays[n] for n in order], filled)
            return sum(jnp.sum(o * c) for o, c in zip(outputs, cotangents, strict=True))

        with jax.enable_x64(True):
            arrays, chosen = {n: jnp.asarray(weights[n]) for n in order}, [jnp.asarray(values[n]) for n in numbers]
            wanted = {n: arrays.pop(n) for n in order if n in of}
            # The weights' memory is given to their gradients.
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), donate_argnums=0)
            by_array, by_input = compiled(wanted, chosen, arrays, list(cotangents))
        names = inputs.names()
        return (
            {n: np.asarray(g) for n, g in by_array.items()},
            {names[n]: np.asarray(g) for n, g in zip(numbers, by_input, strict=True)},
        )

    def run_lifted(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        return self.program(inputs).lifted_outputs(self._ordered(weights), arrays_of(inputs))

    def run_in_float32(self, weights: Arrays, inputs: Inputs) -> list[np.ndarray]:
        with jax.enable_x64(False):
            narrow = [jnp.asarray(w, jnp.float32) for w in self._ordered(weights)]
            outputs = jax.jit(lambda a, i: self._outputs(a, i)[0])(narrow, _traced(inputs))
        return [np.asarray(x, np.float64) for x in outputs]

    def state_after(self, weights: Arrays, inputs: Inputs) -> Arrays:
        """Buffers after one call."""
        with jax.enable_x64(True):
            _, state = jax.jit(self._outputs)([jnp.asarray(w) for w in self._ordered(weights)], _traced(inputs))
        return {name: np.asarray(x, np.float64) for name, x in state.items()}

    def train(self, weights: Arrays, inputs: Inputs, loss: Callable | None, optimizer: Any, steps: int) -> "Trained":
        """Train on one input with an optax transformation."""
        import optax

        names, trained = self._definition.names, self._definition.trained
        given = _traced(inputs)

        def of_loss(parameters, others):
            arrays = [parameters[n] if t else others[n] for n, t in zip(names, trained, strict=True)]
            outputs, state = self._definition.apply(arrays, given)
            value = loss(outputs, *given.values()) if loss else _mean_square(outputs)
            return value, {**others, **{n: x for n, x in state.items() if n in others}}

        def step(parameters, others, state):
            (value, others), grads = jax.value_and_grad(of_loss, has_aux=True)(parameters, others)
            updates, state = optimizer.update(grads, state, parameters)
            return optax.apply_updates(parameters, updates), others, state, value

        with jax.enable_x64(True):
            arrays = dict(zip(names, map(jnp.asarray, self._ordered(weights)), strict=True))
            parameters = {n: arrays[n] for n, t in zip(names, trained, strict=True) if t}
            others = {n: x for n, x in arrays.items() if n not in parameters}
            state, compiled, losses, first = optimizer.init(parameters), jax.jit(step), [], {}
            for number in range(steps):
                parameters, others, state, value = compiled(parameters, others, state)
                losses.append(float(value))
                if number == 0:
                    first = {n: np.asarray(x, np.float64) for n, x in parameters.items()}
        return Trained(np.array(losses), first)

    def program(self, inputs: Inputs) -> Program:
        return self._program(inputs)[0]

    def hold(self, inputs: Inputs, tables: Mapping[int, np.ndarray]) -> None:
        """From now on have these values of the program, exact ones, in place of those that were rounded to float32."""
        program, ladder = self._program(inputs)
        key = _signature(inputs)
        places = [o.place for o in program.operations if tables.keys() & set(o.outputs)]
        self._tables[key] = [*self._tables.get(key, ()), *(NarrowCast("float32", p) for p in places)]
        self._programs[key] = program.with_constants(tables), ladder

    def write_out(self, inputs: Inputs, numbers: frozenset[float]) -> bool:
        """From now on have these, as the other model writes them, for constants that were rounded to float32; whether
        the program for these inputs has such constants."""
        before = self.program(inputs)
        self._written |= numbers
        self._programs = {key: (p.with_numbers(self._written), ladder) for key, (p, ladder) in self._programs.items()}
        return self.program(inputs) is not before

    def record(self, weights: Arrays, inputs: Inputs) -> Recording:
        program = self.program(inputs)
        values = program.run(self._ordered(weights), arrays_of(inputs), lifted=True)
        return recording(program, values, self._definition.names, inputs.names())

    def narrow_casts(self, inputs: Inputs) -> list[NarrowCast]:
        program, ladder = self._program(inputs)
        if ladder is None:
            return [NarrowCast("float32", "the whole program: it can't be traced in float64")]
        found = list(self._tables.get(_signature(inputs), ()))
        for operation in program.operations:
            if operation.primitive == "convert_element_type":
                dtype = jnp.dtype(operation.params["new_dtype"])
                if jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float64:
                    found.append(NarrowCast(dtype.name, operation.place))
        return list(dict.fromkeys(found))

    def _ordered(self, weights: Arrays) -> list[np.ndarray]:
        return [weights[name] for name in self._definition.names]

    def _outputs(self, arrays, inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        outputs, state = self._definition.apply(arrays, inputs)
        leaves = [x for x in jax.tree.leaves(outputs) if hasattr(x, "dtype")]
        if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves):
            raise EngineError("the JAX model returns complex numbers, which can't be compared yet; return real ones")
        return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)], state

    def _program(self, inputs: Inputs) -> "tuple[Program, Callable | None]":
        """And in which of `_LADDER` the model can be traced; None if only in float32."""
        key = _signature(inputs)
        if key not in self._programs:
            program, ladder = self._trace(inputs)
            self._programs[key] = program.with_numbers(self._written), ladder
        return self._programs[key]

    def _trace(self, inputs: Inputs) -> "tuple[Program, Callable | None]":
        def trace(dtype):
            # Their values don't matter; one array serves all weights of its shape.
            blank = functools.cache(lambda shape: jnp.zeros(shape, dtype))
            arrays = [blank(a.shape) for a in self._definition.arrays]
            values = _traced(inputs)
            flat = [jnp.asarray(x) for x in values.values()]

            def function(arrays, flat):
                return self._outputs(arrays, values.with_values(flat))[0]

            return programs.flatten(jax.make_jaxpr(function)(arrays, flat), len(arrays))

        failed = None
        for ladder in _LADDER:
            try:
                with ladder():
                    return trace(jnp.float64), ladder
            except EngineError:
                raise
            except Exception as error:  # the user's own code, which float64 may not suit
                failed = failed or error
        try:
            with jax.enable_x64(False):
                return trace(jnp.float32), None
        except Exception:
            raise EngineError(f"the JAX model can't be traced with these inputs: {in_one_line(failed)}") from failed


def _signature(inputs: Inputs) -> tuple:
    """What a program is traced for."""
    return tuple((np.shape(x), str(np.asarray(x).dtype)) for x in inputs.values()), tuple(inputs.keywords)


def _in_64_bits() -> contextlib.AbstractContextManager:
    return jax.enable_x64(True)


@contextlib.contextmanager
def _where_asked_for() -> Iterator[None]:
    """float64 for what is made of float64 arrays, JAX's 32 bits for everything else: code that mixes its own integers
    with an index in int32 breaks under the other."""
    before = jax.config.jax_explicit_x64_dtypes
    with jax.enable_x64(False):
        jax.config.update("jax_explicit_x64_dtypes", "allow")
        try:
            yield
        finally:
            jax.config.update("jax_explicit_x64_dtypes", before)


_LADDER = (_in_64_bits, _where_asked_for)
"""Ways to compute in float64, the plainest first."""


def recording(program: Program, values: dict[int, Any], names: Sequence[str], inputs: Sequence[str]) -> Recording:
    """A program's values as a recording."""
    steps, module = [], {}
    weights = dict(zip(program.weights, names, strict=True))
    for operation in program.operations:
        sources = tuple(x for x in operation.inputs if not isinstance(x, Constant))
        owners = [module[s] for s in sources if module.get(s)]
        own = next((_module_of(weights[s]) for s in sources if s in weights), "")
        # JAX doesn't say which module computes a value: the last one whose weights went into it is named.
        inherited = own or (f"after {owners[-1].removeprefix('after ')}" if owners else "")
        layout = operation.primitive in LAYOUT
        for number in operation.outputs:
            module[number] = inherited
            steps.append(
                Step(number, operation.primitive, operation.caller, operation.place, inherited, sources, layout)
            )
    # An output that is a constant of the program gets a number that no value has.
    constants = {-1 - i: programs.read(x, values) for i, x in enumerate(program.outputs) if isinstance(x, Constant)}
    outputs = [-1 - i if isinstance(x, Constant) else x for i, x in enumerate(program.outputs)]
    given = dict(zip(program.inputs, inputs, strict=True))
    return Recording(values | constants, steps, weights, given, outputs, program.numbers())


def _mean_square(outputs: Any) -> Any:
    return jnp.mean(jnp.square(next(x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating))))


def _module_of(weight: str) -> str:
    return weight.rpartition(".")[0]


def arrays_of(inputs: Inputs) -> list[np.ndarray]:
    """As the model is given them: floating-point numbers in float64, integers in 32 bits, JAX's default."""
    found = [np.asarray(x) for x in inputs.values()]
    found = [x.astype(np.float64) if programs.is_float(x) else x for x in found]
    return [x.astype(np.int32) if x.dtype == np.int64 else x for x in found]


def _traced(inputs: Inputs) -> Inputs:
    return inputs.with_values(arrays_of(inputs))


# --- Kinds of models ---


def of_nnx(module: Any, training: bool) -> Definition:
    from flax import nnx

    graph, state = nnx.split(module)
    leaves = list(nnx.to_flat_state(state))
    chosen = [i for i, (_, leaf) in enumerate(leaves) if _is_weight(leaf)]

    def apply(arrays, inputs):
        filled = list(leaves)
        for number, array in zip(chosen, arrays, strict=True):
            path, leaf = leaves[number]
            filled[number] = (path, leaf.replace(array))
        merged = nnx.merge(graph, nnx.from_flat_state(filled))
        merged.train() if training else merged.eval()
        outputs = merged(*inputs.arguments, **inputs.keywords)
        after = dict(nnx.to_flat_state(nnx.state(merged)))
        kept = {".".join(map(str, leaves[i][0])): after[leaves[i][0]].get_value() for i in chosen}
        return outputs, {name: kept[name] for name, trained in zip(kept, is_trained, strict=True) if not trained}

    is_trained = [isinstance(leaves[i][1], nnx.Param) for i in chosen]
    names = [".".join(map(str, leaves[i][0])) for i in chosen]
    own = [np.asarray(leaves[i][1].get_value()) for i in chosen]
    for i, x in zip(chosen, own, strict=True):
        path, leaf = leaves[i]
        leaves[i] = path, leaf.replace(blank(x.shape, x.dtype))  # so that its memory can be released
    return Definition("flax.nnx.Module", names, own, is_trained, apply)


def _is_weight(leaf: Any) -> bool:
    """Bare arrays among a module's attributes are its constants."""
    return hasattr(leaf, "get_value") and programs.is_float(leaf.get_value())


def of_linen(module: Any, variables: Any, training: bool) -> Definition:
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    names = [_without(".".join(_key(k) for k in path), "params.") for path, _ in leaves]
    collections = [_key(path[0]) for path, _ in leaves]
    mutable = sorted({c for c in collections if c != "params"}) if training else False

    def apply(arrays, inputs):
        given = jax.tree.unflatten(tree, arrays)
        result = module.apply(given, *inputs.arguments, **inputs.keywords, mutable=mutable)
        if not mutable:
            return result, {}
        outputs, changed = result
        after, _ = jax.tree_util.tree_flatten_with_path(changed)
        return outputs, {".".join(_key(k) for k in path): leaf for path, leaf in after}

    arrays = [np.asarray(leaf) for _, leaf in leaves]
    return Definition("flax.linen.Module", names, arrays, [c == "params" for c in collections], apply)


def of_haiku(transformed: Any, params: Any, state: Any = None) -> Definition:
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [".".join(_key(k) for k in path).replace("/~/", ".").replace("/", ".") for path, _ in leaves]
    kept, state_tree = jax.tree_util.tree_flatten_with_path(state if state is not None else {})
    # `without_apply_rng` takes the random key away.
    rng = (None,) if "rng" in inspect.signature(transformed.apply).parameters else ()
    state_names = [".".join(_key(k) for k in path).replace("/~/", ".").replace("/", ".") for path, _ in kept]

    def apply(arrays, inputs):
        given = jax.tree.unflatten(tree, arrays[: len(names)])
        if state is None:
            return transformed.apply(given, *rng, *inputs.arguments, **inputs.keywords), {}
        before = jax.tree.unflatten(state_tree, arrays[len(names) :])
        outputs, after = transformed.apply(given, before, *rng, *inputs.arguments, **inputs.keywords)
        return outputs, dict(zip(state_names, jax.tree.leaves(after), strict=True))

    arrays = [np.asarray(leaf) for _, leaf in (*leaves, *kept)]
    trained = [True] * len(names) + [False] * len(state_names)
    return Definition("Haiku function", [*names, *state_names], arrays, trained, apply)


def of_tree(tree: Any, call: Callable[..., Any], kind: str) -> Definition:
    """A function of a tree of parameters, or an Equinox module: a tree that can be called."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    chosen = [i for i, (_, leaf) in enumerate(leaves) if programs.is_float(leaf) and not isinstance(leaf, np.generic)]

    names = [".".join(_key(k) for k in leaves[i][0]) for i in chosen]
    own = [np.asarray(leaves[i][1]) for i in chosen]
    others = [leaf for _, leaf in leaves]
    for i in chosen:
        others[i] = None  # so that its memory can be released

    def apply(arrays, inputs):
        filled = list(others)
        for number, array in zip(chosen, arrays, strict=True):
            filled[number] = array
        return call(jax.tree.unflatten(structure, filled), *inputs.arguments, **inputs.keywords), {}

    return Definition(kind, names, own, [True] * len(chosen), apply)


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _without(name: str, prefix: str) -> str:
    return name[len(prefix) :] if name.startswith(prefix) else name


def rewritten(target: Any, weights: Arrays) -> Any:
    """The model with these weights: an NNX module changed in place, or a new one."""

    def with_dtype(name, leaf):
        return jnp.asarray(weights[name], leaf.dtype) if name in weights else leaf

    if any(c.__module__.startswith("flax.nnx") for c in type(target).__mro__):
        from flax import nnx

        state = nnx.state(target)
        leaves = nnx.to_flat_state(state)
        filled = [
            (path, leaf.replace(with_dtype(".".join(map(str, path)), leaf.get_value())) if _is_weight(leaf) else leaf)
            for path, leaf in leaves
        ]
        nnx.update(target, nnx.from_flat_state(filled))
        return target
    tree = target[1] if isinstance(target, tuple) else target
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)

    def name(path):
        joined = ".".join(_key(k) for k in path)
        return _without(joined.replace("/~/", ".").replace("/", "."), "params.")

    made = jax.tree.unflatten(structure, [with_dtype(name(path), leaf) for path, leaf in leaves])
    return (target[0], made, *target[2:]) if isinstance(target, tuple) else made
