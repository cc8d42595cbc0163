"""Check `gradients`: the gradient of the loss with respect to every parameter and every intermediate value."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import IGNORED, Batch
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
    ours: JaxSide, theirs: TorchSide, batch: Batch, accumulation: int, evidence: dict | None
) -> Iterator[Result]:
    """The gradients of one batch; with accumulation 1, those of the values between too."""
    a_loss, a = ours.loss_and_grads(batch, accumulation)
    b_loss, b = theirs.loss_and_grads(batch, accumulation)
    found = {name: places.Place(name, relative_norm(a[name], b[name])) for name in b}
    order = list(b)
    if accumulation == 1:
        a_values, b_values = ours.activation_grads(batch), theirs.activation_grads(batch)
        for name in a_values:
            found[name] = places.Place(name, relative_norm(a_values[name], b_values[name]))
        order = places.backward_order(list(a_values), list(b))
    ordered = [found[name] for name in order]
    if evidence is not None:
        evidence["gradients"] = [(p.name, p.difference) for p in ordered]
    case = f"{len(b)} tensors, accumulation {accumulation}"
    where = places.first_beyond(ordered, LIMIT)
    yield Result("gradients", case, places.worst_of(ordered), LIMIT, where)
    yield Result("gradients", f"loss, accumulation {accumulation}", abs(a_loss - b_loss) / abs(b_loss), LIMIT)


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
