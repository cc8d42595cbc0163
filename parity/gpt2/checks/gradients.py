"""Check `gradients`: the gradient of the loss with respect to every parameter and every intermediate value."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.batches import Batch
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.evidence import Depth
from parity.engine.results import Result, Skipped, relative_norm
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import ACTIVATION_GRADIENTS, GRADIENTS, Adapter
from parity.gpt2.cases import Case
from parity.gpt2.naming import backward_order, first_beyond


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    adapters = candidate, reference
    if skipped := lacking("gradients", "gradients of the loss", *((adapter, GRADIENTS) for adapter in adapters)):
        yield skipped
        return
    values = "gradients of what is between"
    if skipped := lacking("gradients", values, *((adapter, ACTIVATION_GRADIENTS) for adapter in adapters)):
        yield skipped
    batch = uneven_batch(case)
    for accumulation in (1, 4):
        if case.runs(f"accumulation {accumulation}"):
            evidence = case.evidence if accumulation == 1 else None
            yield from compare(*adapters, batch, accumulation, evidence, watched=accumulation == 1)


def compare(
    candidate: Adapter,
    reference: Adapter,
    batch: Batch,
    accumulation: int,
    evidence: dict | None = None,
    *,
    watched: bool = True,
) -> Iterator[Result]:
    """The loss of one batch, and its gradients in the order of the backward pass.

    What isn't `watched`, which costs another compilation, has the gradients of the values between taken only where a
    parameter's differs, to name the first.
    """
    limit, names = limits.GRADIENTS, (candidate.name, reference.name)
    a_loss, a = candidate.loss_and_grads(batch, accumulation)
    b_loss, b = reference.loss_and_grads(batch, accumulation)
    loss = divergence.compare({"loss": np.array([a_loss])}, {"loss": np.array([b_loss])}, names, relative_norm)
    found = divergence.compare(a, b, names, relative_norm)
    seen = ACTIVATION_GRADIENTS.of(candidate) and ACTIVATION_GRADIENTS.of(reference)
    if seen and (watched or not divergence.worst_of(found) <= limit):
        values = (adapter.activation_grads(batch, accumulation) for adapter in (candidate, reference))
        found += divergence.compare(*values, names, relative_norm)
    named = {d.name: d for d in found}
    ordered = [named[name] for name in backward_order([n for n in named if n not in b], list(b))]
    if evidence is not None:
        evidence["gradients"] = Depth("Error by depth, backward", [(d.name, d.difference) for d in ordered], limit)
    title = f"{len(b)} tensors, accumulation {accumulation}"
    worst, where = divergence.worst_of(ordered), first_beyond(ordered, limit)
    if not worst <= limit:
        agrees = loss[0].difference <= limit
        where += "; the loss agrees" if agrees else f"; already the {first_beyond(loss, limit)}"
    yield Result("gradients", title, worst, limit, where)
    figures = "" if loss[0].difference <= limit else f"{a_loss:.12g} in {names[0]}, {b_loss:.12g} in {names[1]}"
    yield Result("gradients", f"loss, accumulation {accumulation}", loss[0].difference, limit, figures)


def uneven_batch(case: Case) -> Batch:
    """Four sequences, some of whose targets don't count, and not equally many in each: a mean over the wrong number
    shows only then."""
    T = case.weights.config.block_size
    windows = case.tokens[: 4 * T + 1]
    inputs = windows[:-1].reshape(4, T)
    targets = windows[1:].reshape(4, T).copy()
    for row in range(1, 4):
        targets[row, : row * T // 5] = IGNORE_INDEX
    return Batch(np.ascontiguousarray(inputs), targets)
