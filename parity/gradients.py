"""Check `gradients`: the gradient of the loss with respect to every parameter, in float64."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import IGNORED, Batch
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_norm

# Gradients sum over every token of the batch and pass through every layer twice; float64 leaves them at 1e-14.
LIMIT = 1e-10


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    batch = _batch(subject)
    for accumulation in (1, 4):
        a_loss, a = ours.loss_and_grads(batch, accumulation)
        b_loss, b = theirs.loss_and_grads(batch, accumulation)
        differences = {name: relative_norm(a[name], b[name]) for name in b}
        worst = max(differences, key=differences.__getitem__)
        case = f"{len(b)} tensors, accumulation {accumulation}"
        yield Result("gradients", case, differences[worst], LIMIT, f"largest in {worst}")
        yield Result("gradients", f"loss, accumulation {accumulation}", abs(a_loss - b_loss) / abs(b_loss), LIMIT)


def _batch(subject: Subject) -> Batch:
    """Four sequences, some of whose targets don't count, and not equally many in each: a mean over the wrong number
    shows only then."""
    T = subject.weights.config.block_size
    windows = subject.tokens[: 4 * T + 1]
    inputs = windows[:-1].reshape(4, T)
    targets = windows[1:].reshape(4, T).copy()
    for row in range(1, 4):
        targets[row, : row * T // 5] = IGNORED
    return Batch(np.ascontiguousarray(inputs), targets)
