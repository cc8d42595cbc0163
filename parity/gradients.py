"""Check `gradients`: the gradient of the loss with respect to every parameter and every intermediate value."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import Batch
from gpt2_core.config import IGNORED
from parity import places
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_norm

# Gradients sum over every token of the batch and pass through every layer twice; float64 leaves them at 1e-14.
LIMIT = 1e-10


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    batch = uneven_batch(subject)
    for accumulation in (1, 4):
        yield from compare(ours, theirs, batch, accumulation, subject.evidence if accumulation == 1 else None)


def compare(
    ours: JaxSide, theirs: TorchSide, batch: Batch, accumulation: int, evidence: dict | None = None
) -> Iterator[Result]:
    """The loss of one batch, and its gradients in the order of the backward pass.

    With accumulation, which costs another compilation, the gradients of the values between are taken only where a
    parameter's differs, to name the first.
    """
    a_loss, a = ours.loss_and_grads(batch, accumulation)
    b_loss, b = theirs.loss_and_grads(batch, accumulation)
    loss = places.compare({"loss": np.array([a_loss])}, {"loss": np.array([b_loss])}, relative_norm)
    found = places.compare(a, b, relative_norm)
    if accumulation == 1 or not places.worst_of(found) <= LIMIT:
        values = (side.activation_grads(batch, accumulation) for side in (ours, theirs))
        found += places.compare(*values, relative_norm)
    named = {place.name: place for place in found}
    ordered = [named[name] for name in places.backward_order([n for n in named if n not in b], list(b))]
    if evidence is not None:
        evidence["gradients"] = [(p.name, p.difference) for p in ordered]
    case = f"{len(b)} tensors, accumulation {accumulation}"
    worst, where = places.worst_of(ordered), places.first_beyond(ordered, LIMIT)
    if not worst <= LIMIT:
        agrees = loss[0].difference <= LIMIT
        where += "; the loss agrees" if agrees else f"; already the {places.first_beyond(loss, LIMIT)}"
    yield Result("gradients", case, worst, LIMIT, where)
    figures = "" if loss[0].difference <= LIMIT else f"{a_loss:.12g} in JAX, {b_loss:.12g} in PyTorch"
    yield Result("gradients", f"loss, accumulation {accumulation}", loss[0].difference, LIMIT, figures)


def uneven_batch(subject: Subject) -> Batch:
    """Four sequences, some of whose targets don't count, and not equally many in each: a mean over the wrong number
    shows only then."""
    T = subject.weights.config.block_size
    windows = subject.tokens[: 4 * T + 1]
    inputs = windows[:-1].reshape(4, T)
    targets = windows[1:].reshape(4, T).copy()
    for row in range(1, 4):
        targets[row, : row * T // 5] = IGNORED
    return Batch(np.ascontiguousarray(inputs), targets)
