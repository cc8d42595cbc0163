"""Batches as a function of (seed, step): nothing else decides the order of the data.

Shapes: B sequences of T tokens. A shard is cut into windows of T+1 tokens that overlap by one (the last target of a
window is the first input of the next) and never cross into another shard; every window is read once an epoch, in a new
random order each epoch, or in the order of the text. In a mixture each source is ordered and repeated separately, and
sampled by weight.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from gpt2_core.config import IGNORE_INDEX, Order
from gpt2_core.data.tokens import Source, Split, check_ids


class Batch(NamedTuple):
    """`inputs` and `targets` (B, T), int32; `targets` are the inputs that follow, or IGNORE_INDEX."""

    inputs: np.ndarray
    targets: np.ndarray


class Windows:
    """The windows of a source for Grain: item i is T+1 tokens of one shard, shape (T+1,), in the shard's dtype."""

    def __init__(self, source: Source, sequence_length: int) -> None:
        self._source, self._sequence_length = source, sequence_length
        counts = [max(0, len(shard) - 1) // sequence_length for shard in source.shards]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> np.ndarray:
        """Raises UserError for an id beyond the vocabulary."""
        number, start = self._locate(i)
        window = self._source.shards[number][start : start + self._sequence_length + 1]
        if self._source.vocab_size is not None:
            check_ids(window, self._source.names[number], start, self._source.vocab_size)
        return window

    def _getitems(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Several at once, without checks: Grain's protocol for a source that reads in batches."""
        starts = map(self._locate, numbers)
        return [self._source.shards[number][start : start + self._sequence_length + 1] for number, start in starts]

    def _locate(self, i: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._ends, i)
        return number, (i - (self._ends[number - 1] if number else 0)) * self._sequence_length


class TrainingBatches:
    """`batches[step]` is the batch of `step`, or this process's part of it: the same in any process at any time.

    `rows` are the places in a batch of the sequences that this process reads, in its order (None: all). Together the
    processes read exactly the sequences that one would. `tokens` may be a plain array of ids too, which is then the
    only shard.
    """

    def __init__(
        self,
        tokens: Split | np.ndarray,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        order: Order = "shuffled",
        rows: Sequence[int] | None = None,
    ) -> None:
        sources = _sources(tokens)
        streams = [
            # Each source has its own seed: otherwise two sources of one size would be read in the same order.
            _ordered(grain.MapDataset.source(Windows(source, sequence_length)), order, (seed + number) % (1 << 32))
            for number, source in enumerate(sources)
        ]
        self._windows = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, [s.weight for s in sources])
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._vocab_size = sources[0].vocab_size

    def sequences(self, step: int) -> list[int]:
        """Places of this process's sequences of a step in the stream that all processes share."""
        return [step * self._batch_size + row for row in self._rows]

    def __getitem__(self, step: int) -> Batch:
        numbers = self.sequences(step)
        # What Grain's own batch() would do with batched reads, for which this version has no option: reading windows
        # one by one takes three times as long.
        windows = np.stack(self._windows._getitems(numbers))
        if self._vocab_size is not None and windows.max() >= self._vocab_size:
            _ = [self._windows[i] for i in numbers]  # raises the error that names the file and the token
        windows = windows.astype(np.int32)
        return Batch(windows[:, :-1], windows[:, 1:])


def evaluation_batches(
    tokens: Split | np.ndarray, *, sequence_length: int, batch_size: int, sequences: int
) -> Iterator[Batch]:
    """`sequences` windows spread evenly over a split (all, if it has fewer), in order, in batches of one shape.

    Evenly, because the first documents of a split may differ from the rest. Each source of a mixture provides a share
    by weight, and one sequence at least. The last batch is padded with sequences whose targets are all IGNORE_INDEX.
    """
    sources = _sources(tokens)
    total = sum(source.weight for source in sources)
    shares = [max(1, round(sequences * source.weight / total)) for source in sources]
    windows = [
        window
        for source, share in zip([Windows(s, sequence_length) for s in sources], shares, strict=True)
        for window in map(source.__getitem__, _evenly_spaced(share, len(source)))
    ]
    for start in range(0, len(windows), batch_size):
        batch = np.zeros((batch_size, sequence_length + 1), np.int32)
        targets = np.full((batch_size, sequence_length), IGNORE_INDEX, np.int32)
        for row, window in enumerate(windows[start : start + batch_size]):
            batch[row] = window
            targets[row] = batch[row, 1:]
        yield Batch(batch[:, :-1], targets)


def _ordered(windows: grain.MapDataset, order: Order, seed: int) -> grain.MapDataset:
    """The windows again and again."""
    return (windows.seed(seed).shuffle() if order == "shuffled" else windows).repeat()


def _evenly_spaced(count: int, of: int) -> list[int]:
    """`count` numbers from 0 to below `of`, evenly spaced; all of them if there are fewer."""
    count = min(count, of)
    return [number * of // count for number in range(count)]


def _sources(tokens: Split | np.ndarray) -> Split:
    return (Source((tokens,), ("",)),) if isinstance(tokens, np.ndarray) else tokens
