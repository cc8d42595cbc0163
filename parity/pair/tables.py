"""Tables and numbers that a JAX program holds as constants (positions, rotary angles, a factor), where the other model
has them exactly.

They were computed in float32 before the program was traced, so that lifting its casts can't make them exact. What
differs by that rounding only is read from the other model; how far the program as it is written is from the exact one
is judged afterwards, as it is for casts.
"""

from collections.abc import Mapping

import numpy as np

from parity.engine.results import relative_to_largest
from parity.models.jax_model import JaxModel
from parity.models.model import Inputs, Recording, Weight
from parity.models.program import Constant, Program
from parity.pair import layouts
from parity.pair.fingerprints import NEAR, Index

ROUNDING = 1e-14
"""Of float64, in a table: what differs by more was rounded to a narrower type."""


def read_tables(model: JaxModel, inputs: Inputs, reference: Recording) -> bool:
    """Have the model compute with the reference's tables and single numbers where its own are rounded; whether there
    are any."""
    numbers = model.write_out(inputs, reference.constants)
    tables = _rounded(model.program(inputs), reference)
    if tables:
        model.hold(inputs, tables)
    return bool(tables) or numbers


def _rounded(program: Program, reference: Recording) -> dict[int, np.ndarray]:
    """Values of the program that depend on nothing and that the reference has but for rounding, as it has them."""
    alone = {n: x for n, x in program.of_constants().items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    theirs = {n: _once(x) for n, x in reference.values.items() if alone and n not in reference.weights}
    index, found = Index(theirs.items()), {}
    for number, value in alone.items():
        once = _once(value)
        near = (x for n in index.find(once, NEAR) if (x := _as(theirs[n], once)) is not None)
        exact = min(near, key=lambda x: relative_to_largest(once, x), default=once)
        if relative_to_largest(once, exact) > ROUNDING:
            found[number] = np.broadcast_to(exact, value.shape)
    return found


def constants_among(weights: Mapping[str, Weight], program: Program) -> list[str]:
    """Frozen weights whose own values the program has as a constant: a table of positions that one of the models keeps
    in its checkpoints and the other computes."""
    frozen = {n: w.value for n, w in weights.items() if w.frozen}
    tables = [x.value for o in program.operations for x in o.inputs if isinstance(x, Constant)] if frozen else []
    tables += program.of_constants().values() if frozen else []
    arrays = [np.asarray(x, np.float64) for x in tables if getattr(x, "dtype", np.dtype(bool)).kind == "f"]
    index = Index(enumerate(arrays))
    return [name for name, own in frozen.items() if any(_as(own, arrays[i]) is not None for i in index.find(own, NEAR))]


def _once(x: np.ndarray) -> np.ndarray:
    """Without repetition for every row of a batch."""
    return x[:1] if x.ndim > 1 and len(x) > 1 and (x == x[:1]).all() else x


def _as(exact: np.ndarray, value: np.ndarray) -> np.ndarray | None:
    """The exact array in the other one's layout, if that is the same but for rounding."""
    axes = layouts.permutation(exact, value, NEAR)
    return None if axes is None else np.ascontiguousarray(exact.transpose(axes).reshape(value.shape))
