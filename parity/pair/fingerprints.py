"""Finding a value on the other side, whatever its layout: by numbers that don't depend on the order of elements."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

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


def evidence(recording: Recording) -> Iterator[tuple[int, np.ndarray]]:
    """The values of a recording that are more than weights, and the parts into which gates, or q, k and v, are split
    after a sum: the other side may compute them one by one."""
    for step in recording.steps:
        x = recording.values.get(step.number)
        if isinstance(x, np.ndarray) and step.number not in recording.from_weights:
            yield step.number, x
            if not step.layout and x.ndim > 1:
                for count in PARTS:
                    if x.shape[-1] % count == 0 and x.shape[-1] > count:
                        yield from ((step.number, part) for part in np.split(x, count, -1))


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
