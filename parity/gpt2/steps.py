"""Two trainings side by side: the first step, and the first value of it, at which they part, and why."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpt2_core.batches import Batch
from gpt2_core.config import TrainConfig
from gpt2_core.weights import Weights
from parity import forward, gradients, places
from parity.places import Place
from parity.sides import JaxSide, Step, TorchSide
from parity.suite import Result, relative_norm

# The root of a small second moment, and the division by it, cost a few units in the last place at every step.
LIMIT = 1e-10


def side_by_side(ours: Iterable[Step], theirs: Iterable[Step]) -> Iterator[tuple[list[Place], dict[str, np.ndarray]]]:
    """What each step made, in the order in which it makes it (loss, norm, moments, parameters), and JAX's parameters
    after it."""
    for a, b in zip(ours, theirs, strict=True):
        reports = ({"loss": np.array([step.loss]), "gradient norm": np.array([step.grad_norm])} for step in (a, b))
        found = places.compare(*reports, relative_norm)
        x, y = a.state(), b.state()
        for what, field in (("first moment", 1), ("second moment", 2), ("parameter", 0)):
            compared = places.compare(x[field], y[field], relative_norm)
            found += [dataclasses.replace(p, name=f"{what} of {p.name}") for p in compared]
        yield found, x.params


def first_divergence(
    weights: Weights, ours: Iterable[Step], theirs: Iterable[Step], config: TrainConfig, batches: Sequence[Batch]
) -> str:
    """«step 7: loss: relative difference 3.1e-08; everything before agrees to 2e-16; forward at the weights before it:
    block 0, mlp activation: ...».

    `ours` and `theirs` are the steps of a training from `weights` on `batches`, JAX's as `config` says. A value that
    differs in the step is looked for in the forward and the backward pass of its batch, at the weights before it.
    """
    before = 0.0
    for number, (found, params) in enumerate(side_by_side(ours, theirs)):
        if not places.worst_of(found) <= LIMIT:
            agrees = f"; the steps before agree to {before:.0e}" if number else ""
            why = _why(_kind(found), weights, config, batches[number])
            return f"step {number}: {in_step(found)}{agrees}; {why}"
        before = max(before, places.worst_of(found))
        weights = dataclasses.replace(weights, arrays=params)
    return f"in a second run losses, norms, moments and parameters agree to {before:.0e}"


def in_step(found: list[Place]) -> str:
    """The first value of a step beyond LIMIT, and how many others of its kind are."""
    kind = _kind(found)
    alike = [place for place in found if place.name.startswith(kind)]
    beyond = sum(not place.difference <= LIMIT for place in alike)
    counted = f"; {beyond} of {len(alike)} {kind}s differ" if len(alike) > 1 else ""
    return places.first_beyond(found, LIMIT) + counted


def _kind(found: list[Place]) -> str:
    return next(place.name for place in found if not place.difference <= LIMIT).partition(" of ")[0]


def _why(kind: str, weights: Weights, config: TrainConfig, batch: Batch) -> str:
    """What in a step from `weights` makes the value that parts first."""
    if kind == "second moment":
        return "the first moments agree: look at the second moment's update"
    if kind == "parameter":
        return "both moments agree: look at the update (bias correction, epsilon, decay, learning rate)"
    # float64, on one device: how the step is executed is no part of it.
    plain = dataclasses.replace(weights, config=dataclasses.replace(weights.config, dropout=0.0))
    ours, theirs = JaxSide(plain), TorchSide(plain)
    passes = {
        "forward": lambda: [forward.compare(ours, theirs, batch.inputs, "")],
        "gradients": lambda: gradients.compare(ours, theirs, batch, config.accumulation),
    }
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
