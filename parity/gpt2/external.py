"""Comparisons with something else than this project's own pair: other weights, or an implementation of the user's."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_core.config import differences
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights
from parity import forward, places
from parity.precision import relative_error
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_norm, relative_to_largest

# Of the error that PyTorch's own float32 or bfloat16 has. Wider than the limit of `precision`, which draws several
# sequences and knows what chance does.
LIMIT_RATIO = 1.5


def weights(subject: Subject, other: Weights) -> Iterator[Result]:
    """Whether two sets of weights are the same model: tensor by tensor, and value by value through a forward pass."""
    changed = list(differences(subject.weights.config, other.config))
    if changed:
        name, a, b = changed[0]
        raise UserError(
            f"--against {other.source}: has {name} {b} where {subject.weights.source} has {a}; not one model"
        )
    ours, theirs = ({n: a.astype(np.float64) for n, a in w.arrays.items()} for w in (subject.weights, other))
    found = [places.Place(name, relative_norm(theirs[name], ours[name])) for name in ours]
    unequal = sum(not place.difference <= 0.0 for place in found)  # a NaN too
    where = places.first_beyond(found, 0.0) if unequal else "every number is equal"
    yield Result("against", f"tensors that differ, of {len(found)}", float(unequal), 0.0, where)
    tokens_BT = subject.tokens[: subject.weights.config.block_size][None]
    a, b = JaxSide(other).intermediates(tokens_BT), JaxSide(subject.weights).intermediates(tokens_BT)
    passed = places.compare(a, b, sides=("--against", "--weights"))
    where = places.first_beyond(passed, forward.LIMIT)
    yield Result("against", f"{len(passed)} values of a forward pass", places.worst_of(passed), forward.LIMIT, where)


def function(subject: Subject, name: str) -> Iterator[Result]:
    """A user's own implementation against the reference in float64.

    `name` is module:function; the function takes token ids, an int64 numpy array (B, T), and gives logits (B, T, V) as
    an array of either framework or numpy. In float64 it must agree to rounding; in a narrower dtype it may be no
    further from the truth than PyTorch is in that dtype.
    """
    compute = _load(name)
    truth = TorchSide(subject.weights)
    block_size = subject.weights.config.block_size
    for batch, length in ((1, 1), (1, block_size), (4, max(1, block_size // 2 + 1))):
        tokens_BT = subject.tokens[: batch * length].reshape(batch, length).astype(np.int64)
        expected = truth.logits(tokens_BT)
        logits, dtype = _as_numpy(compute(tokens_BT), name)
        if logits.shape != expected.shape:
            raise UserError(f"--against {name}: gives the shape {logits.shape} for {batch} x {length} tokens; "
                            f"expected {expected.shape}")  # fmt: skip
        case = f"{name}: logits in {dtype}, {batch} x {length} tokens"
        if dtype == "float64":
            yield Result(
                "against", case, relative_to_largest(logits, expected), forward.LIMIT, _where(logits, expected)
            )
            continue
        reference = relative_error(TorchSide(subject.weights, dtype).logits(tokens_BT), expected)
        error = relative_error(logits, expected)
        where = f"relative error {error:.1e}, PyTorch's {reference:.1e}; {_where(logits, expected)}"
        yield Result("against", f"{case}: error over PyTorch's", error / reference, LIMIT_RATIO, where)


def _where(logits: np.ndarray, expected: np.ndarray) -> str:
    row, position, token = np.unravel_index(np.argmax(np.abs(logits - expected)), expected.shape)
    return f"largest at sequence {row}, position {position}, token {token}"


def _load(name: str) -> Callable[[np.ndarray], Any]:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--against {name}: {error}; expected module:function, importable from here") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"--against {name}: is not a function of token ids")
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
