"""Two opened models with what makes them comparable: inputs for both, the mapping of their weights, equal weights."""

import dataclasses
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Map
from typing import Any, TypeVar

import numpy as np

from parity.engine.errors import EngineError
from parity.models.memory import give_back_memory
from parity.models.model import Arrays, Inputs, Model, Weight
from parity.models.opening import open_model
from parity.pair.by_name import rows_by_name
from parity.pair.by_running import rows_by_running
from parity.pair.by_value import rows_by_value
from parity.pair.capturing import Captured
from parity.pair.mapping import Mapping, Row, complete, from_table, with_buffers, with_unused
from parity.pair.weights import draw

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mapping leads from `source` to `target`; either may be the candidate."""

    reference: Model
    candidate: Model
    from_reference: bool
    """Whether the reference is the source."""
    cases: list[tuple[Inputs, Inputs]]
    """Inputs of the reference and of the candidate."""
    to_candidate: Callable[[Any], Any] | None
    mapping: Mapping
    weights: dict[str, Arrays]
    """By role: "reference", "candidate"."""

    @property
    def source(self) -> Model:
        return self.reference if self.from_reference else self.candidate

    @property
    def target(self) -> Model:
        return self.candidate if self.from_reference else self.reference

    def directed(self, candidate: T, reference: T) -> tuple[T, T]:
        """What belongs to the two roles as what belongs to source and target."""
        return (reference, candidate) if self.from_reference else (candidate, reference)

    def undirected(self, source: T, target: T) -> tuple[T, T]:
        """What belongs to source and target as what belongs to candidate and reference."""
        return (target, source) if self.from_reference else (source, target)

    def rows(self, source: Map[str, Any], target: Map[str, Any]) -> list[Row]:
        """Rows of the mapping whose tensors are in these."""
        return [r for r in self.mapping.rows if r.target in target and all(n in source for n in r.source)]

    def left(self, role: str) -> list[str]:
        """Weights of this role's model without a counterpart."""
        return self.mapping.source_left if (role == "reference") == self.from_reference else self.mapping.target_left

    def made_of(self, role: str) -> dict[str, tuple[str, ...]]:
        """Of each weight of this role's model the weights of the other one that are the same."""
        if (role == "candidate") == self.from_reference:
            return {row.target: row.source for row in self.mapping.rows}
        back: dict[str, tuple[str, ...]] = {}
        for row in self.mapping.rows:
            for name in row.source:
                back[name] = (*back.get(name, ()), row.target)
        return back

    @property
    def names(self) -> tuple[str, str]:
        """Of candidate and reference, for the page."""
        if self.candidate.framework != self.reference.framework:
            return self.candidate.framework, self.reference.framework
        return "candidate", "reference"


def opened(
    reference: Any,
    candidate: Any,
    *,
    inputs: Any,
    to_candidate: Callable[[Any], Any] | None = None,
    mapping: Any = None,
    ignore: Sequence[str] = (),
    training: bool = False,
    own: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Both models with their mapping and weights; arguments as of `compare`, `own` for each model's own weights."""
    progress("opening both models")
    cases = _cases(inputs, to_candidate)
    reference, candidate = open_model(reference, "reference", training), open_model(candidate, "candidate", training)
    # Values are followed in a program, and JAX models have one.
    from_reference = hasattr(candidate, "program") or not hasattr(reference, "program")
    source, target = (reference, candidate) if from_reference else (candidate, reference)
    mine, theirs = {w.name: w for w in source.weights()}, {w.name: w for w in target.weights()}
    for name in ignore:
        if name not in mine and name not in theirs:
            raise EngineError(f"ignore: {name} is a weight of neither model")
    # What was captured can't be run again with other weights.
    fixed, own = own or isinstance(source, Captured), own or isinstance(target, Captured)
    given = cases[0] if from_reference else cases[0][::-1]
    tables = _tables(mine, target, given[1])
    ignore = (*ignore, *tables)
    held = {n: w.value for n, w in mine.items()} if fixed else draw(mine.values(), np.random.default_rng(seed), tables)
    if not fixed:
        # The values that it is compared on are its own from now on: models are large.
        mine = {n: dataclasses.replace(w, own=held[n]) for n, w in mine.items()}
        source.release()
        give_back_memory()
    progress("mapping the weights")
    if mapping is not None:
        table = from_table(mapping, mine, theirs, ignore)
    else:
        table = complete(_rows((source, target), (mine, theirs), held, given, ignore), mine, theirs, ignore)
    made = {} if own else table.apply(held)
    filled = made | {name: w.value for name, w in theirs.items() if name not in made}
    if not own:
        target.release()
    by_role = {"reference": held, "candidate": filled} if from_reference else {"reference": filled, "candidate": held}
    return Comparison(reference, candidate, from_reference, cases, to_candidate, table, by_role)


def _rows(
    models: tuple[Model, Model],
    weights: tuple[dict[str, Weight], dict[str, Weight]],
    held: Arrays,
    given: tuple[Inputs, Inputs],
    ignore: Sequence[str],
) -> list[Row]:
    """The mapping's rows, by following values where the target has a program to follow them in."""
    source, target = models
    if isinstance(target, Captured):
        return rows_by_value(*weights, ignore)
    if not hasattr(target, "program"):
        rows = rows_by_name(*weights, ignore)
        if not isinstance(source, Captured) and not all(r.verified for r in rows):
            followed = rows_by_running(source, target, weights, held, given, ignore)
            rows = with_unused(with_buffers(followed, *weights), *weights)
        return rows
    from parity.models.jax_model import arrays_of
    from parity.pair.inference import Inference
    from parity.pair.tables import read_tables

    recording = source.record(held, given[0])
    read_tables(target, given[1], recording)
    program = target.program(given[1])
    inference = Inference(recording, weights[0], held, program, weights[1], arrays_of(given[1]), ignore)
    return with_unused(with_buffers(inference.rows, *weights), *weights)


def _tables(source: dict[str, Weight], target: Model, given: Inputs) -> list[str]:
    """Weights of the source that the target's program has as constants."""
    if not hasattr(target, "program") or not any(w.frozen for w in source.values()):
        return []
    from parity.pair.tables import constants_among

    return constants_among(source, target.program(given))


def _cases(inputs: Any, to_candidate: Callable[[Any], Any] | None) -> list[tuple[Inputs, Inputs]]:
    given = inputs() if callable(inputs) else inputs
    several = given if isinstance(given, list) else [given]
    if not several:
        raise EngineError("inputs: the list is empty; give at least one input")
    convert = to_candidate or (lambda x: x)
    return [(checked(Inputs.of(x)), checked(Inputs.of(convert(x)))) for x in several]


def checked(inputs: Inputs) -> Inputs:
    """The inputs as numpy arrays; raises EngineError if one isn't an array of numbers."""
    values = []
    for name, x in zip(inputs.names(), inputs.values(), strict=True):
        array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if array.dtype.kind not in "fiub" and not array.dtype.name.startswith("bfloat"):
            raise EngineError(f"{name} is of type {array.dtype}; expected an array of numbers")
        values.append(array)
    return inputs.with_values(values)
