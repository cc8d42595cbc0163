"""Check `forward`: the logits of both models in float64."""

from collections.abc import Iterator

import numpy as np

from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_to_largest

# Rounding in float64 is 1e-16; sums over a few hundred terms and some tens of layers leave it below 1e-14. A wrong
# formula shows at 1e-5 and above, a float32 somewhere at 1e-7.
LIMIT = 1e-12


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    block_size = subject.weights.config.block_size
    for batch, length in ((1, 1), (1, block_size), (4, max(1, block_size // 2 + 1))):
        tokens_BT = subject.tokens[: batch * length].reshape(batch, length)
        a, b = ours.logits(tokens_BT), theirs.logits(tokens_BT)
        row, position, token = np.unravel_index(np.argmax(np.abs(a - b)), a.shape)
        where = f"largest at sequence {row}, position {position}, token {token}"
        yield Result("forward", f"logits, {batch} x {length} tokens", relative_to_largest(a, b), LIMIT, where)
