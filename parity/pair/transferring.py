"""Writing one model's weights into the other by their mapping."""

from typing import Any

import numpy as np

from parity.engine.errors import EngineError
from parity.models.opening import open_model
from parity.pair.compare import compare
from parity.pair.mapping import Mapping


def transfer(source: Any, target: Any, *, inputs: Any, to_candidate: Any = None, mapping: Any = None, ignore=()) -> Any:
    """The target with the source's weights.

    A torch or NNX module is changed in place and returned; of the others, which are immutable, a new one: (Linen
    module, variables), an Equinox module, (function, parameters). Each weight keeps the target's dtype.

    Raises EngineError where a weight has no counterpart or may be several.
    """
    found = compare(
        source,
        target,
        inputs=inputs,
        to_candidate=to_candidate,
        mapping=mapping,
        ignore=ignore,
        checks=("weights", "forward"),  # outputs that agree settle which of several tensors a weight is
        generate=False,
    )
    # A port that computes something else gets its weights all the same: to look for the reason they are needed.
    if failed := [r for r in found.results if r.check == "weights" and not r.passed]:
        raise EngineError(f"transfer: {failed[0].case}: {failed[0].where}")
    if found.doubts:
        raise EngineError(f"transfer: {found.doubts[0]}")
    opened = open_model(source, "source"), open_model(target, "target")
    own = {w.name: w.value for w in opened[0].weights()}
    made = _directed(found, own)
    return write(target, made)


def _directed(found, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if found.from_reference:
        return found.table.apply(own)
    return inverse(found.table, own)


def inverse(mapping: Mapping, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mapping's source from its target; raises EngineError where a transform can't be taken back."""
    made = {}
    for row in mapping.rows:
        if len(row.source) > 1 or not row.transform.can_undo():
            raise EngineError(
                f"transfer: {row.transform} of {', '.join(row.source)} can't be taken back; transfer the other way"
            )
        made[row.source[0]] = row.transform.undo(weights[row.target], mapping.shapes[row.source[0]])
    return made


def write(target: Any, weights: dict[str, np.ndarray]) -> Any:
    """The model with these weights, by the names that `open_model` gives them."""
    if hasattr(target, "state_dict"):
        import torch

        with torch.no_grad():
            for name, t in (*target.named_parameters(), *target.named_buffers()):
                if name in weights:
                    t.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))
        return target
    from parity.models.jax_model import rewritten

    return rewritten(target, weights)
