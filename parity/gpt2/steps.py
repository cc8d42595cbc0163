"""Two trainings side by side: the first step, and the first value of it, at which they diverge, and why."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpt2_core.config import TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_core.weights import Weights
from parity.engine import divergence
from parity.engine.divergence import Divergence
from parity.engine.results import Result, relative_norm
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import GRADIENTS, Adapter, Step
from parity.gpt2.checks import forward, gradients
from parity.gpt2.naming import first_beyond


def side_by_side(
    ours: Iterable[Step], theirs: Iterable[Step], names: tuple[str, str]
) -> Iterator[tuple[list[Divergence], dict[str, np.ndarray]]]:
    """What each step made, in the order in which it makes it (loss, norm, moments, parameters), and the candidate's
    parameters after it."""
    for a, b in zip(ours, theirs, strict=True):
        reports = ({"loss": np.array([step.loss]), "gradient norm": np.array([step.grad_norm])} for step in (a, b))
        found = divergence.compare(*reports, names, relative_norm)
        x, y = a.state(), b.state()
        for what, field in (("first moment", 1), ("second moment", 2), ("parameter", 0)):
            compared = divergence.compare(x[field], y[field], names, relative_norm)
            found += [dataclasses.replace(d, name=f"{what} of {d.name}") for d in compared]
        yield found, x.params


def first_divergence(
    weights: Weights,
    candidate: Adapter,
    reference: Adapter,
    config: TrainConfig,
    plainly: TrainConfig,
    batches: Sequence[Batch],
) -> str:
    """'step 7: loss: relative difference 3.1e-08; everything before agrees to 2e-16; forward at the weights before it:
    block 0, mlp activation: ...'.

    Both train once more from `weights` on `batches`, the candidate as `config` says and the reference as `plainly`. A
    value that differs in the step is looked for in the forward and the backward pass of its batch, at the weights
    before it.
    """
    before = 0.0
    steps = candidate.steps(config, batches), reference.steps(plainly, batches)
    for number, (found, params) in enumerate(side_by_side(*steps, (candidate.name, reference.name))):
        if not divergence.worst_of(found) <= limits.STEP:
            agrees = f"; the steps before agree to {before:.0e}" if number else ""
            why = _why(_kind(found), weights, candidate, reference, config, batches[number])
            return f"step {number}: {in_step(found)}{agrees}; {why}"
        before = max(before, divergence.worst_of(found))
        weights = dataclasses.replace(weights, arrays=params)
    return f"in a second run losses, norms, moments and parameters agree to {before:.0e}"


def in_step(found: list[Divergence]) -> str:
    """The first value of a step beyond its limit, and how many others of its kind are."""
    kind = _kind(found)
    alike = [d for d in found if d.name.startswith(kind)]
    beyond = sum(not d.difference <= limits.STEP for d in alike)
    counted = f"; {beyond} of {len(alike)} {kind}s differ" if len(alike) > 1 else ""
    return first_beyond(found, limits.STEP) + counted


def _kind(found: list[Divergence]) -> str:
    return next(d.name for d in found if not d.difference <= limits.STEP).partition(" of ")[0]


def _why(kind: str, weights: Weights, candidate: Adapter, reference: Adapter, config: TrainConfig, batch: Batch) -> str:
    """What in a step from `weights` makes the value that parts first."""
    if kind == "second moment":
        return "the first moments agree: look at the second moment's update"
    if kind == "parameter":
        return "both moments agree: look at the update (bias correction, epsilon, decay, learning rate)"
    # float64, on one device: how the step is executed is no part of it.
    plain = dataclasses.replace(weights, config=dataclasses.replace(weights.config, dropout=0.0))
    ours, theirs = candidate.make(plain), reference.make(plain)
    passes = {"forward": lambda: [forward.compare(ours, theirs, batch.inputs, "")]}
    if GRADIENTS.of(ours) and GRADIENTS.of(theirs):
        passes["gradients"] = lambda: gradients.compare(ours, theirs, batch, config.accumulation)
    for name, run in passes.items():
        failed: list[Result] = [result for result in run() if not result.passed]
        if failed:
            return f"{name} at the weights before it: {failed[0].where}"
    agree = "forward and gradients agree at the weights before it"
    if kind == "first moment":
        return f"{agree}: look at clipping and at the first moment's update"
    return f"{agree}: look at how the step is executed ({_execution(config)})"


def _execution(config: TrainConfig) -> str:
    names = ("mesh", "accumulation", "scan_layers", "remat", "attention", "gradient_exchange")
    chosen = {name: getattr(config, name) for name in names} | {"dropout": config.model.dropout}
    return ", ".join(f"{name} {value}" for name, value in chosen.items())
