"""Check `optimizer`: parameters and both moments after AdamW steps, and the decay that each tensor really gets."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.divergence import Divergence
from parity.engine.results import Result, Skipped, relative_norm
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import DECAY, TRAINING, Adapter
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks.gradients import uneven_batch
from parity.gpt2.naming import first_beyond
from parity.gpt2.steps import in_step, side_by_side

_DECAY = 0.1


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    adapters = candidate, reference
    if skipped := lacking("optimizer", "AdamW steps", *((adapter, TRAINING) for adapter in adapters)):
        yield skipped
    else:
        if case.runs("steps"):
            yield from _steps(case, candidate, reference)
        if case.runs("an update left out") and case.at(False, True, prove=True):
            yield from _left_out(case, candidate, reference)
    for adapter in adapters if case.runs("decay") else ():
        if skipped := lacking("optimizer", "decay of each tensor", (adapter, DECAY)):
            yield skipped
            continue
        applied, shapes = adapter.applied_decay(_DECAY), case.weights.config.parameter_shapes
        wrong = {n: abs(applied[n] - (_DECAY if len(s) >= 2 else 0.0)) for n, s in shapes.items()}
        first = next((n for n in wrong if not wrong[n] <= limits.STEP), None)
        where = f"{first}: {applied[first]:.3g}" if first else f"{_DECAY} on matrices, 0 on vectors"
        measured = float(np.max(list(wrong.values())))
        title = f"{adapter.name}: decay of each of {len(wrong)} tensors"
        yield Result("optimizer", title, measured, limits.STEP, where)


def _steps(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    batch, names = uneven_batch(case), (candidate.name, reference.name)
    norm = reference.train(_config(case, 1, 0.0), [batch]).grad_norms[0]
    clip_norms = {"inactive": 1e6 * norm, "active": norm / 10}
    every = [(steps, clipping) for steps in (1, 10) for clipping in clip_norms]
    # Steps that aren't clipped are in `loss_curve` too.
    for steps, clipping in case.at([(10, "active")], every, prove=[(1, "active"), (10, "inactive")]):
        config = _config(case, steps, clip_norms[clipping])
        a, b = (adapter.steps(config, [batch] * steps) for adapter in (candidate, reference))
        title = f"AdamW, {steps} {'step' if steps == 1 else 'steps'}, clipping {clipping}"
        yield _compare(side_by_side(a, b, names), title)


def _left_out(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    """A batch with a token whose embedding is infinite, between two others: its update is left out whole, the count of
    the bias correction included, so the state is that of the two others alone."""
    model = dataclasses.replace(case.weights.config, n_layer=1, tie_embeddings=False)
    weights, batch = random_weights(model, case.seed), uneven_batch(case)
    token = next(i for i in range(model.vocab_size) if i not in batch.inputs)
    weights.arrays["wte.weight"][token] = np.inf
    infinite = batch._replace(inputs=batch.inputs.copy())
    infinite.inputs[0, 0] = token

    def after(adapter: Adapter, batches: list[Batch]) -> dict[str, np.ndarray]:
        config = dataclasses.replace(_config(case, len(batches), 0.0), model=model)
        for step in adapter.make(weights).steps(config, batches):
            last = step
        params, first, second = last.state()
        params = params | {"wte.weight": np.delete(params["wte.weight"], token, axis=0)}
        kinds = {"first moment": first, "second moment": second, "parameter": params}
        return {f"{kind} of {name}": array for kind, found in kinds.items() for name, array in found.items()}

    due = after(reference, [batch, batch])
    for adapter in (reference, candidate):
        names = (adapter.name, f"{reference.name} without it")
        found = divergence.compare(after(adapter, [batch, infinite, batch]), due, names, relative_norm)
        title = f"{adapter.name}: an update that isn't finite, between two others, is left out"
        yield Result("optimizer", title, divergence.worst_of(found), limits.STEP, first_beyond(found, limits.STEP))


def _config(case: Case, steps: int, clip_norm: float) -> TrainConfig:
    # A constant rate, so that what fails here is no schedule; and a small one: the gradient of a key's bias is zero but
    # for rounding, which Adam divides by its epsilon and the rate carries into the parameter.
    optimizer = OptimizerConfig(learning_rate=2e-4, warmup_steps=0, final_fraction=1.0, clip_norm=float(clip_norm))
    return TrainConfig(
        model=case.weights.config, optimizer=optimizer, steps=steps, batch_size=4, precision="float64", mesh=1
    )


def _compare(compared: Iterator[tuple[list[Divergence], Any]], title: str) -> Result:
    """Up to the first step that differs: those after it only carry it on."""
    largest = (0.0, "nothing differs")
    for number, (found, _) in enumerate(compared):
        worst = divergence.worst_of(found)
        if not worst <= limits.STEP:
            return Result("optimizer", title, worst, limits.STEP, f"step {number}: {in_step(found)}")
        largest = max(largest, (worst, f"step {number}, {first_beyond(found, limits.STEP)}"))
    return Result("optimizer", title, largest[0], limits.STEP, largest[1])
