"""Batches as a function of (seed, step): nothing else decides the order of the data.

Shapes: B sequences of T tokens. A split is cut into windows of T+1 tokens that overlap by one (the last target
of a window is the first input of the next); every window comes once an epoch, in an order drawn anew each epoch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

# A target of this id counts neither in the loss nor in its mean (PyTorch's ignore_index, with nanoGPT's value).
IGNORED = -1


class Batch(NamedTuple):
    """`inputs` and `targets` (B, T), int32; `targets` are the inputs that follow, or IGNORED."""

    inputs: np.ndarray
    targets: np.ndarray


class Windows:
    """The windows of a split as a Grain source: item i is tokens iT .. iT+T, int32 of shape (T+1,)."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self._tokens = tokens
        self._block_size = block_size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._block_size

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(i) * self._block_size
        return self._tokens[start : start + self._block_size + 1].astype(np.int32)


class TrainingBatches:
    """`batches[step]` is this process's part of the batch of `step`, the same in any process at any time.

    `batch_size` counts all processes' sequences. The stream is shuffled and repeated first and dealt out to
    the processes after, so that together they see the very sequences that one process would.
    """

    def __init__(
        self, tokens: np.ndarray, *, block_size: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        windows = grain.MapDataset.source(Windows(tokens, block_size)).seed(seed).shuffle().repeat()
        self._batches = windows[process::processes].batch(batch_size // processes)

    def __getitem__(self, step: int) -> Batch:
        windows = self._batches[step]
        return Batch(windows[:, :-1], windows[:, 1:])


def evaluation_batches(tokens: np.ndarray, *, block_size: int, batch_size: int, sequences: int) -> Iterator[Batch]:
    """The first `sequences` windows of a split (all, if it has fewer) in order, in batches of one shape.

    The last batch is filled up with sequences whose targets are all IGNORED.
    """
    windows = Windows(tokens, block_size)
    count = min(sequences, len(windows))
    for start in range(0, count, batch_size):
        batch = np.zeros((batch_size, block_size + 1), np.int32)
        targets = np.full((batch_size, block_size), IGNORED, np.int32)
        for row, i in enumerate(range(start, min(start + batch_size, count))):
            batch[row] = windows[i]
            targets[row] = batch[row, 1:]
        yield Batch(batch[:, :-1], targets)
