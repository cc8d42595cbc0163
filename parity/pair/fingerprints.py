"""Finding a value on the other side, whatever its layout: by numbers that don't depend on the order of elements."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from parity.models.model import Recording, Step

CLOSE = 1e-8
"""Of two fingerprints: far above rounding in float64, far below any mistake."""
PARTS = (2, 3, 4)
"""Into how many parts values are split."""
NEAR = 3e-5
"""Where one side holds constants that were rounded to float32."""


def fingerprint(x: np.ndarray) -> np.ndarray | None:
    """Moments of the elements; None for what can't identify a value: a constant, a single number, no numbers."""
    if x.dtype.kind != "f" or x.size < 2:
        return None
    flat = x.ravel()
    if flat[0] == flat[-1] and (flat == flat[0]).all():
        return None
    finite = np.isfinite(flat)
    if not finite.all():
        flat = np.where(finite, flat, 0.0)
    largest = np.abs(flat).max()
    scale = largest * np.sqrt(np.mean(np.square(flat / largest))) if largest else 0.0  # squares may overflow
    if not np.isfinite(scale) or scale == 0.0:
        return None
    y = flat / scale
    moments = y.mean(), np.abs(y).mean(), np.mean(y * y * y), np.cos(3 * y).mean(), np.sin(5 * y).mean()
    return np.array([np.log(scale), *moments, np.mean(~finite)])


def evidence(recording: Recording, lengths: Collection[int] = ()) -> Iterator[tuple[int, np.ndarray]]:
    """The values of a recording that are more than weights, and the parts that the other side may compute one by one:
    those into which gates, or q, k and v, are split after a sum, and the steps of loops of these lengths."""
    for step in recording.steps:
        x = recording.values.get(step.number)
        if isinstance(x, np.ndarray) and step.number not in recording.from_weights:
            yield step.number, x
            if not step.layout:
                yield from ((step.number, part) for part in _split(x))
            for slices in _of_loops(x, lengths):
                for one in slices:
                    yield step.number, one
                    yield from ((step.number, part) for part in _split(one))


def _split(x: np.ndarray) -> Iterator[np.ndarray]:
    """Equal parts along the last axis."""
    for count in PARTS if x.ndim > 1 else ():
        if x.shape[-1] % count == 0 and x.shape[-1] > count:
            yield from np.split(x, count, -1)


def _of_loops(x: np.ndarray, lengths: Collection[int]) -> Iterator[np.ndarray]:
    """The value with the steps of a loop as its first axis, if they are one of its axes or part of its rows."""
    if x.ndim < 2:
        return
    for length in lengths:
        yield from (np.moveaxis(x, axis, 0) for axis in range(x.ndim - 1) if x.shape[axis] == length)
        if x.ndim == 2 and length < len(x) and len(x) % length == 0:
            yield x.reshape(length, -1, x.shape[1])
            yield x.reshape(-1, length, x.shape[1]).swapaxes(0, 1)


class Index:
    """Values by their fingerprints."""

    @classmethod
    def of(cls, recording: Recording, steps: Iterable[Step] | None = None) -> "Index":
        """The values of these steps, or of all."""
        chosen = recording.steps if steps is None else steps
        arrays = ((s.number, recording.values.get(s.number)) for s in chosen)
        return cls((n, x) for n, x in arrays if isinstance(x, np.ndarray))

    def __init__(self, values: Iterable[tuple[int, np.ndarray]]) -> None:
        found = defaultdict(list)
        for number, x in values:
            if (f := fingerprint(x)) is not None:
                found[x.size].append((number, f))
        self._by_size = {
            size: ([n for n, _ in entries], np.stack([f for _, f in entries])) for size, entries in found.items()
        }

    def find(self, x: np.ndarray, close: float = CLOSE) -> list[int]:
        """Numbers of the values with the same elements, in their order."""
        entry = self._by_size.get(x.size)
        if entry is None or (f := fingerprint(x)) is None:
            return []
        numbers, fingerprints = entry
        # The third moment of heavy tails is large, and its rounding with it.
        error = np.abs(fingerprints - f) / np.maximum(1.0, np.abs(f))
        return [numbers[i] for i in np.flatnonzero(error.max(axis=1) <= close)]
