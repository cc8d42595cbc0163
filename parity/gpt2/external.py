"""Comparisons with something else than this project's own pair: other weights, or an implementation of the user's."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_core.config.io import differences
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights
from parity.engine import divergence
from parity.engine.divergence import Divergence
from parity.engine.errors import EngineError
from parity.engine.precision import relative_error
from parity.engine.results import Result, Skipped, relative_norm, relative_to_largest
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import Adapter
from parity.gpt2.cases import Case
from parity.gpt2.naming import first_beyond
from parity.models import functions
from parity.models.model import Inputs
from parity.models.opening import open_model
from parity.pair.compare import compare
from parity.pair.divergence import locate
from parity.pair.hints import hints


def weights(case: Case, candidate: Adapter, other: Weights) -> Iterator[Result]:
    """Whether two sets of weights are the same model: tensor by tensor, and value by value through a forward pass of
    the candidate."""
    changed = list(differences(case.weights.config, other.config))
    if changed:
        name, a, b = changed[0]
        raise UserError(f"--against {other.source}: has {name} {b} where {case.weights.source} has {a}; not one model")
    ours, theirs = ({n: a.astype(np.float64) for n, a in w.arrays.items()} for w in (case.weights, other))
    found = [Divergence(name, relative_norm(theirs[name], ours[name])) for name in ours]
    unequal = sum(not d.difference <= limits.NONE for d in found)  # a NaN too
    where = first_beyond(found, limits.NONE) if unequal else "every number is equal"
    yield Result("against", f"tensors that differ, of {len(found)}", float(unequal), limits.NONE, where)
    tokens_BT = case.tokens[: case.weights.config.block_size][None]
    a, b = candidate.make(other).intermediates(tokens_BT), candidate.intermediates(tokens_BT)
    passed = divergence.compare(a, b, ("--against", "--weights"))
    where = first_beyond(passed, limits.FORWARD)
    title = f"{len(passed)} values of a forward pass"
    yield Result("against", title, divergence.worst_of(passed), limits.FORWARD, where)


def implementation(case: Case, reference: Adapter, name: str) -> Iterator[Result | Skipped]:
    """A user's own implementation against the reference in float64; `name` is module:attribute.

    A model of either framework, or a function without arguments that makes one, goes through `parity.compare` with the
    weights that it holds: its tensors, its values, its gradients.
    """
    given = _load(name)
    if functions.is_plain_function(given):
        yield from _function(case, reference, name, given)
        return
    tokens = [tokens_BT for tokens_BT in _tokens(case)]
    try:
        found = compare(reference.module(), given, inputs=tokens, weights="own")
    except EngineError as error:
        raise UserError(f"--against {name}: {error}") from error
    hint = "; ".join(found.hints[:2])
    for r in found.results:
        where = f"{r.where}; {hint}" if hint and not r.passed and r.check == "forward" else r.where
        yield Result("against", f"{r.check}: {r.case}", r.measured, r.limit, where)
    for s in found.skipped:
        yield Skipped("against", f"{s.check}: {s.reason}")


def _tokens(case: Case) -> Iterator[np.ndarray]:
    block_size = case.weights.config.block_size
    for batch, length in ((1, 1), (1, block_size), (4, max(1, block_size // 2 + 1))):
        yield case.tokens[: batch * length].reshape(batch, length).astype(np.int64)


def _function(case: Case, reference: Adapter, name: str, compute: Callable[[np.ndarray], Any]) -> Iterator[Result]:
    """A function that takes token ids, an int64 numpy array (B, T), and gives logits (B, T, V) as
    an array of either framework or numpy. In float64 it must agree to rounding; in a narrower dtype it may be no
    further from the truth than the reference is in that dtype.
    """
    for tokens_BT in _tokens(case):
        batch, length = tokens_BT.shape
        expected = reference.logits(tokens_BT)
        logits, dtype = _as_numpy(compute(tokens_BT), name)
        if logits.shape != expected.shape:
            raise UserError(f"--against {name}: gives the shape {logits.shape} for {batch} x {length} tokens; "
                            f"expected {expected.shape}")  # fmt: skip
        title = f"{name}: logits in {dtype}, {batch} x {length} tokens"
        apart = relative_to_largest(logits, expected) > (
            limits.FORWARD if dtype == "float64" else limits.FLOAT32_LOGITS
        )
        where = (_first_place(compute, reference, tokens_BT) if apart else "") or _where(logits, expected)
        if dtype == "float64":
            yield Result("against", title, relative_to_largest(logits, expected), limits.FORWARD, where)
            continue
        error = relative_error(logits, expected)
        other = relative_error(reference.make(case.weights, dtype).logits(tokens_BT), expected)
        where = f"relative error {error:.1e}, {reference.name}'s {other:.1e}; {where}"
        yield Result("against", f"{title}: error over {reference.name}'s", error / other, limits.EXTERNAL_RATIO, where)


def _first_place(compute: Callable, reference: Adapter, tokens_BT: np.ndarray) -> str:
    """The first value that differs, with a hint; empty for a function that can't be followed."""
    recording = functions.record(compute, tokens_BT)
    if recording is None:
        return ""
    theirs = open_model(reference.module(), "reference")
    truth = theirs.record({w.name: w.value for w in theirs.weights()}, Inputs.of(tokens_BT))
    place = locate(recording, truth, [], {})
    return "; ".join([str(place), *hints(recording, truth, place)[:2]]) if place else ""


def _where(logits: np.ndarray, expected: np.ndarray) -> str:
    row, position, token = np.unravel_index(np.argmax(np.abs(logits - expected)), expected.shape)
    return f"largest at sequence {row}, position {position}, token {token}"


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--against {name}: {error}; expected module:function, importable from here") from error
    finally:
        sys.path.pop(0)
    return function


def _as_numpy(logits: Any, name: str) -> tuple[np.ndarray, str]:
    """The values as float64 numpy, and the name of the dtype they came in."""
    if hasattr(logits, "detach"):
        logits = logits.detach().cpu()
        dtype = str(logits.dtype).removeprefix("torch.")
        array = logits.double().numpy()
    else:
        dtype = str(logits.dtype) if hasattr(logits, "dtype") else ""
        array = np.asarray(logits, np.float64)
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(
            f"--against {name}: gives {dtype or type(logits).__name__}; expected float32, bfloat16 or float64"
        )
    return array, dtype
